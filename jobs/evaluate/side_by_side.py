"""Readers side by side: the same windows and prompts, in one table and one plot each, with intervals of 95 %.

Perplexity's differences are paired: nats a token of the reader that the others are compared with less those of each,
over the windows that both have scored. Below zero it foretells better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.common.plot import plot_panels
from jobs.config.evaluation import RIVALS
from jobs.evaluate.losses import Interval, Scored, at_steps, difference, perplexity, read_losses, renamed
from jobs.evaluate.trials import Trial, interval, read_trials, share
from jobs.measures.result import Point, Result, Table, Value

STEPS = "tokens of context"
EXACT = "exact"
Part = tuple[list[Point], list[Table], list[str]]  # of a Result


class Measured(NamedTuple):
    """What a finished measurement of a task (perplexity, passkey) is of: {who read, as the measurement calls it: what
    it is called here}."""

    task: str
    names: Mapping[str, str]


def side_by_side(
    title: str, measured: Mapping[str, Measured], directories: Mapping[str, Path], compared: str, output: Path
) -> Result:
    """`measured`: by its key in `directories`; `compared`: whose differences from the others are shown. Plots go into
    `output`. Points are those of rivals and the differences: the rest have the measurements themselves."""
    scored: list[Scored] = []
    trials: dict[str, Mapping[int, Sequence[Trial]]] = {}
    for key, (task, names) in measured.items():
        if task == "perplexity":
            scored += renamed(read_losses(directories[key]), names)
        else:
            trials[names["model"]] = read_trials(directories[key])
    parts: list[Part] = []
    if scored:
        parts.append(_perplexities(scored, compared, output))
    if trials:
        parts.append(_passkeys(trials, output))
    return Result(
        title,
        {"compared": compared},
        [point for points, _, _ in parts for point in points],
        [table for _, tables, _ in parts for table in tables],
        [plot for _, _, plots in parts for plot in plots],
    )


def called(name: str) -> str:
    """A reader as tables show it."""
    return f"base, {RIVALS[name]}" if name in RIVALS else name


def _perplexities(scored: Sequence[Scored], compared: str, output: Path) -> Part:
    """In all and by source."""
    points, tables, panels = [], [], {}
    readers, sources = dict.fromkeys(one.name for one in scored), sorted({one.source for one in scored})
    steps = sorted({one.step for one in scored})
    columns = [f"{step:,}" for step in steps]
    for source in [None, *(sources if len(sources) > 1 else [])]:
        windows = {name: at_steps(scored, name, source) for name in readers}
        curves = {name: {step: perplexity(each) for step, each in own.items()} for name, own in windows.items()}
        reference = windows.get(compared, {})
        gaps = {
            name: {step: gap for step in own if (gap := difference(reference.get(step, []), own[step])) is not None}
            for name, own in windows.items()
            if name != compared
        }
        where, end = source or "all sources", f"/{source}" if source else ""
        tables += [
            Table(f"Perplexity, {where}", ["read by", *columns], _rows(curves, steps)),
            Table(f"Nats a token, {compared} less each, {where}", ["beside", *columns], _rows(gaps, steps)),
        ]
        rivals = {f"perplexity/{name}{end}": curve for name, curve in curves.items() if name in RIVALS}
        differences = {f"nats_less/{name}{end}": gap for name, gap in gaps.items()}
        points += [
            Point(metric, step, each.value)
            for metric, curve in {**rivals, **differences}.items()
            for step, each in curve.items()
        ]
        panels[where] = {
            called(name): {step: each.value for step, each in curve.items()} for name, curve in curves.items()
        }
    plot = "perplexity-readers.png"
    plot_panels(panels, STEPS, "perplexity a token", output / plot, logarithmic=True)
    return points, tables, [plot]


def _passkeys(trials: Mapping[str, Mapping[int, Sequence[Trial]]], output: Path) -> Part:
    shares = {name: {step: share(own[step], EXACT) for step in sorted(own)} for name, own in trials.items()}
    steps = sorted({step for own in shares.values() for step in own})
    rows: list[list[Value]] = [
        [called(name), *(_with_interval(own[step]) if step in own else None for step in steps)]
        for name, own in trials.items()
    ]
    table = Table("Passkey, exact", ["read by", *(f"{step:,}" for step in steps)], rows)
    points = [
        Point(f"passkey/{EXACT}/{name}", step, each)
        for name, own in shares.items()
        if name in RIVALS
        for step, each in own.items()
    ]
    plot, curves = "passkey-readers.png", {called(name): own for name, own in shares.items()}
    plot_panels({"passkey, exact": curves}, STEPS, "share found", output / plot, shares=True)
    return points, [table], [plot]


def _rows(by_reader: Mapping[str, Mapping[int, Interval]], steps: Sequence[int]) -> list[list[Value]]:
    return [
        [called(name), *(str(own[step]) if step in own else None for step in steps)] for name, own in by_reader.items()
    ]


def _with_interval(trials: Sequence[Trial]) -> str:
    return f"{share(trials, EXACT):.2f} ({interval(trials, EXACT)})"
