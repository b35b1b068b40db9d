"""Charts of a sweep, as PNG: what staleness buys, how that compares, and what it costs.

- matplotlib is optional: it comes with the extra `demo`, and nothing else here needs it.
"""

from pathlib import Path
from typing import Any

from rollfleet_common.errors import SettingsError
from rollfleet_console.simulate.sweep import ETAS, SIGMAS, Row, select

__all__ = ["draw", "need_matplotlib"]

#: Effective throughput at ETAS, AReaL (arXiv 2505.24298): figure 5c (thousand tokens/s), and the
#: 8-GPU table. Read off the publication.
AREAL = {
    "AReaL, figure 5c": (128.7, 269.3, 356.6, 356.6, 371.7, 382.4),
    "AReaL, 8 GPUs": (27.1, 47.8, 47.8, 49.0, 51.5, 52.0),
}
#: One hue, darker with the spread of lengths.
COLOURS = dict(zip(SIGMAS, ("#7db8da", "#2b7bba", "#08306b"), strict=True))
X = range(len(ETAS))


def need_matplotlib() -> Any:
    """pyplot, drawing to files.

    Raises:
        SettingsError: It is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # optional
    except ModuleNotFoundError as exc:
        raise SettingsError(
            'charts need matplotlib: pip install "rollfleet[demo]", or give --no-charts'
        ) from exc
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415  # optional

    plt.rcParams.update(
        {
            "font.size": 8.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "figure.dpi": 100,
        }
    )
    return plt


def draw(swept: dict[str, Any], folder: Path) -> list[Path]:
    """Write the charts of a sweep; returns their paths."""
    plt = need_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for name, chart in (("throughput", _throughput), ("shape", _shape), ("cost", _cost)):
        figure = chart(plt, swept)
        path = folder / f"simulate-{name}.png"
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)
        drawn.append(path)
    return drawn


def _of(rows: list[Row], key: str) -> list[float]:
    """A column by ETAS; a gap where a run starved."""
    at = {row["max_staleness"]: row for row in rows if not row["starved"]}
    return [at[eta][key] if eta in at else float("nan") for eta in ETAS]


def _axis(axis: Any, title: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xticks(list(X), [str(eta) for eta in ETAS])
    axis.set_xlabel("max_staleness")
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)


def _throughput(plt: Any, swept: dict[str, Any]) -> Any:
    """Trained samples an hour by staleness, a panel for each number of slots."""
    table, base = swept["table"], swept["reference"]
    sizes = sorted({row["slots"] for row in table})
    figure, axes = plt.subplots(1, len(sizes), figsize=(11, 3.0), layout="constrained")
    for axis, slots in zip(axes, sizes, strict=True):
        for sigma in SIGMAS:
            for cancel in (True, False):
                rows = select(table, slots=slots, sigma=sigma, early_cancel=cancel)
                y = [value / 1000 for value in _of(rows, "samples_per_h")]
                style = {"ls": "-", "marker": "o"} if cancel else {"ls": "--", "marker": ""}
                label = f"sigma {sigma}" + ("" if cancel else ", no early cancel")
                axis.plot(X, y, color=COLOURS[sigma], ms=3.5, lw=1.4, label=label, **style)
        factor = slots / base["samples_per_version"]
        _axis(axis, f"{slots} slots = {factor:g} x samples of a version", "")
    axes[0].set_ylabel("trained samples per hour, thousands")
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=6
    )
    return figure


def _shape(plt: Any, swept: dict[str, Any]) -> Any:
    """Throughput as a share of that at 16, beside what was published."""
    base = swept["reference"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
    rows = select(swept["table"], slots=base["slots"], early_cancel=True)
    for sigma in SIGMAS:
        y = _of(select(rows, sigma=sigma), "samples_per_h")
        left.plot(X, _share(y), "-o", color=COLOURS[sigma], ms=3.5, lw=1.4, label=f"sigma {sigma}")
    y = _of(swept["capped"], "samples_per_h")
    left.plot(X, _share(y), "-s", color="#d95f0e", ms=3.5, lw=1.4, label="sigma 1.0, with a budget")
    for (name, published), style in zip(AREAL.items(), (":", "--"), strict=True):
        left.plot(X, _share(list(published)), style, color="#555555", lw=1.4, label=name)
    _axis(left, f"share of the throughput at 16, {base['slots']} slots", "")
    left.legend(fontsize=7, loc="lower right")
    paced = swept["pacing_only"]
    mine = select(rows, sigma=base["sigma"])
    right.bar(
        [x - 0.2 for x in X],
        _percent(_of(paced, "over_bound")),
        0.4,
        color="#d95f0e",
        label="pacing alone",
    )
    right.bar(
        [x + 0.2 for x in X],
        _percent(_of(mine, "over_bound")),
        0.4,
        color="#2b7bba",
        label="four guards (0 everywhere)",
    )
    _axis(right, f"trained samples over the bound, %, sigma {base['sigma']}", "")
    right.legend(fontsize=7)
    return figure


def _cost(plt: Any, swept: dict[str, Any]) -> Any:
    """What the bound costs: tokens, long prompts, and how old the rest is."""
    base = swept["reference"]
    rows = select(swept["table"], slots=base["slots"], early_cancel=True)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.0), layout="constrained")
    panels = (
        ("slots_generating", "slot time that generates, %"),
        ("tokens_dropped", "tokens made and dropped, %"),
        ("longest_trained", "longest tenth of samples: trained, %"),
        ("staleness_mean", "mean staleness, versions"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        for sigma in SIGMAS:
            y = _of(select(rows, sigma=sigma), key)
            if key != "staleness_mean":
                y = _percent(y)
            axis.plot(X, y, "-o", color=COLOURS[sigma], ms=3.5, lw=1.4, label=f"sigma {sigma}")
        _axis(axis, title, "")
    axes[0].legend(fontsize=7, loc="lower right")
    return figure


def _share(values: list[float]) -> list[float]:
    return [value / values[-1] for value in values]


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]
