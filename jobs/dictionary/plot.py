"""The plot of the dictionary task: accuracy by tokens in memory."""

from collections.abc import Sequence
from pathlib import Path

from jobs.dictionary.evaluate import Row


def plot_accuracy(rows: Sequence[Row], target: Path) -> None:
    """Each way of attending a line through the medians, each seed a dot, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150)
    for way, style in zip(dict.fromkeys(row.way for row in rows), ("o-", "s--"), strict=False):
        ours = [row for row in rows if row.way == way]
        (line,) = axes.plot([row.tokens for row in ours], [row.median for row in ours], style, label=way)
        for row in ours:
            axes.plot([row.tokens] * len(row.by_seed), row.by_seed, ".", color=line.get_color(), alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of dictionary in memory")
    axes.set_ylabel("accuracy on value tokens, median of seeds")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Software": None})
    pyplot.close(figure)
