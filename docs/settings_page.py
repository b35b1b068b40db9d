"""docs/settings.md, made of the settings themselves: ``python docs/settings_page.py``."""

from collections.abc import Iterator
from pathlib import Path

from rollfleet.settings import TrainerSettings
from rollfleet_common.settings import Described
from rollfleet_worker.settings import WorkerSettings

__all__ = ["page"]

_HEAD = """# Settings

<!-- Made by `python docs/settings_page.py`; a test fails if it is not current. -->

A value is taken from, in this order: the argument or flag, the environment variable, the TOML file that
`--config` or `ROLLFLEET_CONFIG` names, the default. A name that is unknown is an error.
"""
_PARTS = (
    (
        "Trainer",
        "Keyword arguments of `rollfleet.connect` and `rollfleet.connect_ranks`.",
        TrainerSettings.described,
    ),
    ("Worker", "Flags of `rollfleet worker`.", WorkerSettings.described),
)


def _rows(settings: list[Described], *, flags: bool) -> Iterator[str]:
    yield f"| {'flag' if flags else 'argument'} | variable | default | what it sets |"
    yield "|---|---|---|---|"
    for one in settings:
        cells = one.flag if flags else one.name, one.env, one.default
        shown = [f"`{cell}`".replace("|", "\\|") if cell else "" for cell in cells]
        text = " ".join(one.text.split()).replace("|", "\\|")
        yield f"| {' | '.join(shown)} | {text} |"


def page() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for title, what, described in _PARTS:
        lines += [f"## {title}", "", what, "", *_rows(described(), flags=title == "Worker"), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix("").with_name("settings.md").write_text(page(), encoding="utf-8")
