"""Models side by side: every metric that several of them have, by context length, as tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.common.plot import plot_curves
from jobs.common.version import code_version
from jobs.config.evaluation import READERS_TASKS
from jobs.config.variants import Comparison
from jobs.evaluate.side_by_side import Measured, side_by_side
from jobs.measures.result import RESULT, Point, Result, Table
from jobs.workflow.data_stages import Inputs
from jobs.workflow.outcome import report_stage
from pipelines.workflow.credentials import without_credentials
from pipelines.workflow.store import Output, Stage

TASK = "comparison"
COMPARED = {  # metric -> (title, what its steps are)
    "perplexity/model": ("perplexity a token, held-out documents", "tokens of context"),
    "perplexity/model/distracted": ("perplexity a token beside other documents", "tokens of other documents in memory"),
    "bits_per_byte/model": ("bits per byte, held-out documents", "tokens of context"),
    "passkey/exact": ("passkey retrieval", "tokens of context"),
}
MASS = "attention_mass/layer"


def comparison_stages(
    comparison: Comparison, made: Mapping[str, Mapping[str, Output]]
) -> tuple[list[Stage], dict[str, Output]]:
    """The stages that lay the variants side by side, and what they read: evaluations, as "<variant>-<task>"."""
    evaluations = {name: comparison.recipe(name, Path("a-model")).evaluation for name in made}
    tasks = {name: list(evaluation.tasks) for name, evaluation in evaluations.items()}
    inputs = {f"{name}-{task}": made[name][task] for name in made for task in tasks[name]}
    first = next(name for name, variant in comparison.variants.items() if variant.after is None)
    compared = next((name for name, variant in comparison.variants.items() if not variant.set), first)
    measured = {
        f"{name}-{task}": Measured(task, {"model": name, **({"base": "base"} if name == first else {})})
        for name in made
        for task in tasks[name]
        if task in READERS_TASKS
    }
    for task in evaluations[first].rivalled:
        for rival in evaluations[first].rivals:
            measured[f"{task}-{rival}"] = Measured(task, {"model": rival})
            inputs[f"{task}-{rival}"] = made[first][f"{task}-{rival}"]

    def run(output: Path, directories: Inputs) -> None:
        points = {
            name: [point for task in tasks[name] for point in Result.read(directories[f"{name}-{task}"]).points]
            for name in made
        }
        result = compare({"base": base_points(points[first]), **points}, output)
        beside = side_by_side(TASK, measured, directories, compared, output)
        joined = Result(
            TASK,
            {**result.settings, **beside.settings},
            [*result.points, *beside.points],
            [*result.tables, *beside.tables],
            [*result.plots, *beside.plots],
        )
        joined.write(output)

    params = {"tasks": tasks, "compared": compared}
    stage = Stage(TASK, run, params, inputs=tuple(inputs), version=2, content=RESULT)
    settings = {
        **comparison.common.described(),
        "variants": {
            name: without_credentials(variant.model_dump(mode="json")) for name, variant in comparison.variants.items()
        },
    }
    facts = {"models": ", ".join(made), "code": code_version()}
    report = report_stage(comparison.common.name, [TASK], settings, lambda inputs, results: facts, [TASK])
    return [stage, report], inputs


def base_points(points: Sequence[Point]) -> list[Point]:
    """What a variant measured of the base it began with, as if of a model of its own."""
    return [
        point._replace(metric=point.metric.removesuffix("/base") + "/model")
        for point in points
        if point.metric.endswith("/base")
    ]


def compare(points: Mapping[str, Sequence[Point]], output: Path) -> Result:
    """`points`: of each model, by its name. Plots go into `output`."""
    tables, plots, compared = [], [], []
    for metric, (title, steps_are) in _compared(points).items():
        curves = {
            name: {point.step: point.value for point in own if point.metric == metric} for name, own in points.items()
        }
        curves = {name: curve for name, curve in curves.items() if curve}
        if len(curves) < 2:
            continue
        steps = sorted(set().union(*curves.values()))
        rows = [[name, *(curve.get(step) for step in steps)] for name, curve in curves.items()]
        tables.append(Table(title, [steps_are, *map(str, steps)], rows))
        compared += [Point(f"{metric}/{name}", step, curve[step]) for name, curve in curves.items() for step in curve]
        if len(steps) > 1:
            plots.append(f"{metric.replace('/', '-')}.png")
            plot_curves(curves, steps_are, title, output / plots[-1])
    return Result(TASK, {"models": list(points)}, compared, tables, plots)


def _compared(points: Mapping[str, Sequence[Point]]) -> dict[str, tuple[str, str]]:
    """The metrics to lay side by side, those of every memory layer among them."""
    layers = sorted({point.metric for own in points.values() for point in own if point.metric.startswith(MASS)})
    means = [metric for metric in layers if metric.removeprefix(MASS).isdigit()]
    return COMPARED | {metric: (f"r_d in layer {metric.removeprefix(MASS)}", "d") for metric in means}
