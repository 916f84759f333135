"""Plots of evaluations, as PNGs: curves by context length, attention mass by d, heat maps.

The same values give the same bytes. Tokens stand on a logarithmic axis and are written short: 512, 2k, 1M.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.workflow.files import complete_or_invisible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#d1605e", "#5f9e6e", "#8172b2", "#c48a2c", "#64748b", "#b55d9b", "#3f3f46")
MARKERS = "osD^vPX*"
Curve = Mapping[int, float]


def plot_curves(
    curves: Mapping[str, Curve], steps_are: str, values_are: str, target: Path, shares: bool = False
) -> None:
    """Values by step, a line for each name; a step of 0 stands left of the logarithmic axis. The axis of `shares` shows
    0 to 1, so that small differences look small."""
    with _drawing(target) as axes:
        _lines(axes, curves)
        _tokens_axis(axes, {step for curve in curves.values() for step in curve})
        axes.set_xlabel(steps_are)
        axes.set_ylabel(values_are)
        if shares:
            axes.set_ylim(-0.02, 1.02)
        if len(curves) > 1:
            axes.legend(frameon=False)


def plot_panels(
    panels: Mapping[str, Mapping[str, Curve]],
    steps_are: str,
    values_are: str,
    target: Path,
    shares: bool = False,
    logarithmic: bool = False,
) -> None:
    """Curves beside each other, a panel for each title: values by step, a line for each name. `logarithmic`: values
    whose worst are far from the others; `shares` as for `plot_curves`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(6.4 * columns, 4 * rows), dpi=150, squeeze=False, layout="constrained"
    )
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        _lines(axes, curves)
        _tokens_axis(axes, {step for curve in curves.values() for step in curve})
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            values = [value for curve in curves.values() for value in curve.values()]
            decades = max(values) > 10 * min(values)
            axes.yaxis.set_minor_formatter(NullFormatter() if decades else StrMethodFormatter("{x:g}"))
        if shares:
            axes.set_ylim(-0.02, 1.02)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(steps_are)
        axes.set_ylabel(values_are)
    for empty in list(grid.flat)[len(panels) :]:
        empty.set_visible(False)
    grid[0][0].legend(frameon=False)
    _save(figure, target)


def plot_times(curves: Mapping[str, Mapping[datetime, float]], values_are: str, target: Path) -> None:
    """Values by time (UTC), a line for each name."""
    from matplotlib.dates import date2num

    with _drawing(target) as axes:
        for number, (name, curve) in enumerate(curves.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            times = sorted(curve)
            values = [curve[time] for time in times]
            axes.plot(date2num(times), values, label=name, color=colour, marker=marker, markersize=5)
        axes.xaxis_date()
        axes.set_xlabel("time (UTC)")
        axes.set_ylabel(values_are)
        axes.tick_params(axis="x", labelrotation=30)
        axes.legend(frameon=False)


def plot_mass(curves: Mapping[str, Curve], target: Path) -> None:
    """r_d by d beside 1/d, what a model has that does not tell documents apart."""
    with _drawing(target) as axes:
        steps = sorted({step for curve in curves.values() for step in curve})
        axes.plot(steps, [1 / step for step in steps], "--", color="#9ca3af", label="1/d: all contexts alike")
        _lines(axes, curves)
        _tokens_axis(axes, steps)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:g}")
        axes.set_xlabel("d, contexts in memory (one of them of the own document)")
        axes.set_ylabel("r_d, attention mass on the own document")
        axes.legend(frameon=False)


def plot_heat_maps(
    shares: Mapping[str, Sequence[Sequence[float | None]]], lengths: Sequence[int], depths: Sequence[str], target: Path
) -> None:
    """For each title a map of shares (0 to 1) with a row for each depth and a column for each length in tokens; None is
    left white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 2.2 + max(2.4, 0.62 * len(lengths)) * len(shares)
    figure, all_axes = pyplot.subplots(
        1, len(shares), figsize=(width, 3.4), dpi=150, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, rows) in zip(all_axes[0], shares.items(), strict=True):
        values = [[float("nan") if share is None else share for share in row] for row in rows]
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if share is not None:
                    colour = "white" if share < 0.6 else "black"
                    axes.text(x, y, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
        axes.set_yticks(range(len(depths)), depths)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens of context")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    all_axes[0][0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=all_axes[0], format=lambda share, _: f"{share:.0%}", pad=0.02)
    _save(figure, target)


def plot_heads(shares: Mapping[str, Sequence[Sequence[float]]], marked: Sequence[int], target: Path) -> None:
    """For each title a map of shares (0 to 1) with a row for each layer and a column for each head; `marked` layers are
    framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    first = next(iter(shares.values()))
    layers, heads = len(first), len(first[0])
    size = (1.6 + max(2.4, 0.16 * heads) * len(shares), 1.2 + max(2.4, 0.16 * layers))
    figure, all_axes = pyplot.subplots(
        1, len(shares), figsize=size, dpi=150, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, rows) in zip(all_axes[0], shares.items(), strict=True):
        image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for layer in marked:
            axes.add_patch(Rectangle((-0.5, layer - 0.5), heads, 1, fill=False, edgecolor=COLOURS[1], linewidth=1.5))
        axes.set_xticks(range(0, heads, -(-heads // 16)))
        axes.set_yticks(range(0, layers, -(-layers // 40)))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("head")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
    all_axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=all_axes[0], format=lambda share, _: f"{share:.0%}", pad=0.02)
    _save(figure, target)


def short(tokens: int) -> str:
    """512, 1.5k, 64k, 1M: k is 1024, for lengths that are such multiples to one place; others in full."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens and 10 * tokens % size == 0 and tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


@contextmanager
def _drawing(target: Path) -> Iterator["Axes"]:
    """Empty axes, to be drawn on; then they are saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    yield axes
    _save(figure, target)


def _save(figure: "Figure", target: Path) -> None:
    from matplotlib import pyplot

    with complete_or_invisible(target) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _lines(axes: "Axes", curves: Mapping[str, Curve]) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        steps = sorted(curve)
        axes.plot(steps, [curve[step] for step in steps], label=name, color=colour, marker=marker, markersize=5)


def _tokens_axis(axes: "Axes", steps: Iterable[int]) -> None:
    ticks = sorted(steps)
    if ticks[0] > 0:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=min((step for step in ticks if step), default=1), linscale=0.5)
    axes.set_xticks(ticks, [short(step) for step in ticks])
    axes.set_xticks([], minor=True)
