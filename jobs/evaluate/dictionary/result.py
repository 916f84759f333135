"""What the dictionary task came to: table, points and plot."""

from collections.abc import Mapping
from pathlib import Path

from jobs.common.plot import plot_curves
from jobs.config.dictionary import DictionaryEvaluation
from jobs.evaluate.dictionary.accuracy import Accuracy, summarize
from jobs.measures.result import Point, Result, Table

TASK = "dictionary"
PLOT = "dictionary.png"


def dictionary_result(
    by_seed: Mapping[int, Accuracy], settings: DictionaryEvaluation, cpu_minutes: Mapping[int, float], output: Path
) -> Result:
    """`cpu_minutes`: of each seed's training, where it was trained here."""
    rows, metrics = summarize(by_seed, settings.top_k)
    columns = ["memory attended to", "tokens in memory", "median", *(f"seed {seed}" for seed in by_seed)]
    note = f"{rows[0].trials:,} value tokens asked a size and seed; memory in {settings.dtype}."
    if cpu_minutes:
        taken = ", ".join(f"{minutes:.1f} (seed {seed})" for seed, minutes in cpu_minutes.items())
        note += f" CPU-minutes of training: {taken}."
    table = Table(
        "Accuracy on value tokens by size of the dictionary",
        columns,
        [[row.way, row.tokens, row.median, *row.by_seed] for row in rows],
        note,
    )
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(row.way, {})[row.tokens] = row.median
    plot_curves(
        curves,
        "tokens of dictionary in memory",
        "accuracy on value tokens, median of seeds",
        output / PLOT,
        shares=True,
    )
    points = [Point(name, step, value) for name, value, step in metrics]
    points += [Point("dictionary/cpu_minutes", seed, minutes) for seed, minutes in cpu_minutes.items()]
    return Result(TASK, settings.model_dump(mode="json"), points, [table], [PLOT])
