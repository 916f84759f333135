"""The plot of a run: perplexity by context length."""

from collections.abc import Mapping
from pathlib import Path


def plot_perplexity(base: Mapping[int, float], fot: Mapping[int, float], local: int, target: Path) -> None:
    """Perplexity against tokens of context, the fine-tuned model's curve beside the base, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150)
    for label, values, style in (("base, memory layers untrained", base, "s--"), ("FoT", fot, "o-")):
        axes.plot([context * local for context in values], list(values.values()), style, label=label)
    axes.set_xscale("log", base=2)
    ticks = [context * local for context in fot]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(f"context in tokens (local context: {local})")
    axes.set_ylabel("perplexity per token, held-out documents")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Software": None})
    pyplot.close(figure)
