"""The settings of a part, as a page of `--help`."""

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rollfleet_common.settings import Settings

__all__ = ["show_settings"]


def show_settings(settings: type[Settings]) -> None:
    """Print every setting of a part: flag, what it means, and its default."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column(max_width=32, overflow="fold")
    table.add_column(ratio=1)
    for one in settings.described():
        flag, _, value = one.flag.partition(" ")
        said = Text(flag, style="bold cyan")
        said.append(f" {value}", style="not bold yellow" if "/" not in value else "bold cyan")
        text = Text(one.text)
        if one.repeatable:
            text.append(" Repeatable.", style="dim")
        if one.default not in ("", "false"):
            text.append(f"  [default: {one.default}]", style="dim")
        table.add_row(said, text)
    table.add_row(
        Text("--config", style="bold cyan").append(" FILE", style="not bold yellow"),
        Text(f"TOML file: the section [{settings.part}], and what all parts share at its top."),
    )
    example = settings.described()[-1]
    note = Text(
        f"Every setting may also be a variable ({example.flag.partition(' ')[0]} is {example.env}) "
        "or stand in the TOML file. Flags win over variables, these over the file.",
        style="dim",
    )
    console = Console(highlight=False)
    console.print(Panel(table, title="Settings", title_align="left", border_style="dim"))
    console.print(note)
