"""What a workflow came to: a page for people, and what MLflow is told (metrics, tables, plots, lineage, the model)."""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs.common.version import code_version, made_by
from jobs.config.recipe import Recipe
from jobs.config.train_spec import METRICS, MODEL
from jobs.evaluate.subject import read_config
from jobs.measures.result import RESULT, Result
from jobs.probe.probing import TASK as PROBE
from jobs.registry.gate import decide, metrics_by_name
from jobs.registry.record import Outcome
from jobs.registry.server import Point
from jobs.registry.tracking import TrainingFacts
from jobs.train.metrics import last_metrics
from jobs.workflow.data_stages import SHARDS, Inputs
from jobs.workflow.evaluation_stages import read_results
from jobs.workflow.report import write_report
from jobs.workflow.training_stages import CONTINUES, origin
from pipelines.tokens.shards import MANIFEST, Manifest
from pipelines.workflow.files import write_atomically
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.store import RECORD, Stage

Results = Sequence[tuple[Result, Path]]
RECIPE, LINEAGE, REPORT = "recipe.json", "lineage.json", "report.html"


def report_stage(
    title: str,
    tasks: Sequence[str],
    settings: Mapping[str, Any],
    facts: Callable[[Inputs, Results], Mapping[str, str]],
    made: Sequence[str],
) -> Stage:
    """A page about the stages `made`, with the settings and the lineage of each of their files beside it.

    `tasks`: stages that hold a result; `facts`: what to know first.
    """

    def run(output: Path, inputs: Inputs) -> None:
        results = read_results(tasks, inputs)
        lineage = {name: json.loads((path / RECORD).read_text()) for name, path in inputs.items()}
        texts = {"settings": json.dumps(settings, indent=1), "lineage": json.dumps(lineage, indent=1)}
        write_atomically(output / RECIPE, texts["settings"].encode())
        write_atomically(output / LINEAGE, texts["lineage"].encode())
        write_report(output / REPORT, title, facts(inputs, results), results, texts)

    return Stage("report", run, {"settings": settings}, inputs=tuple(made))


def make_outcome(
    name: str,
    tasks: Sequence[str],
    inputs: Inputs,
    tags: Mapping[str, str],
    params: Mapping[str, Any] = MappingProxyType({}),
    model: Path | None = None,
    trainings: Sequence[Path] = (),
) -> Outcome:
    """What MLflow is told of a finished workflow. `inputs`: the outputs of its stages, `report` among them; `model`:
    what becomes a registered version, in the output of the stage whose content it is."""
    results, report = read_results(tasks, inputs), inputs["report"]
    artifacts = {name: report / name for name in (RECIPE, LINEAGE, REPORT)}
    if SHARDS in inputs:
        artifacts[MANIFEST] = inputs[SHARDS] / MANIFEST
    for result, directory in results:
        artifacts |= {f"{result.task}/{name}": directory / name for name in (RESULT, *result.plots)}
    return Outcome(
        key=report.name,  # the hash of all that led to it
        name=name,
        tags={**made_by(), **tags},
        params={"tasks": ", ".join(tasks), **params},
        metrics=metric_points(results),
        artifacts=artifacts,
        model=model,
        trainings=trainings,
        content=None if model is None else json.loads((model.parent / RECORD).read_text())["hash"],
    )


def metric_points(results: Results) -> list[Point]:
    """Points with the time at which their stage was finished: recorded again they are the same."""
    return [
        (metric, value, step, (directory / RECORD).stat().st_mtime)
        for result, directory in results
        for metric, step, value in result.points
    ]


def _trained(inputs: Inputs) -> tuple[int, int]:
    """Steps and tokens that the model was fine-tuned for, with those before it was continued."""
    last = last_metrics(inputs["finetune"] / METRICS)
    assert last is not None, "a finished training has metrics"
    return int(last["step"]), int(last["tokens"])


def recipe_report(recipe: Recipe, made: Sequence[str]) -> Stage:
    """The page of a recipe."""

    def facts(inputs: Inputs, results: Results) -> dict[str, str]:
        manifest = Manifest.read(inputs[SHARDS])
        steps, tokens = _trained(inputs)
        decision = decide(recipe.registry.promote, metrics_by_name(metric_points(results)))
        return {
            "training": f"{recipe.finetune.objective.kind}, {steps:,} steps, {tokens:,} tokens",
            "base": origin(inputs["base"] / MODEL),
            "data": f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, manifest {manifest.hash}",
            "code": code_version(),
            "gate": "; ".join(decision.reasons),
        }

    return report_stage(recipe.name, measured_stages(recipe, made), recipe.described(), facts, made)


def measured_stages(recipe: Recipe, made: Container[str]) -> list[str]:
    """The recipe's stages that hold a result."""
    return [name for name in (PROBE, *recipe.evaluation.results) if name in made]


def recipe_outcome(recipe: Recipe, inputs: Inputs) -> Outcome:
    """What MLflow is told of a finished recipe."""
    manifest = Manifest.read(inputs[SHARDS])
    steps, tokens = _trained(inputs)
    tags = {
        "fot.kind": "recipe",
        "fot.recipe": hash_json(recipe.described()),
        "fot.manifest": manifest.hash,
        "fot.base": origin(inputs["base"] / MODEL),
        "fot.tokens_seen": str(tokens),
    }
    tags |= {name: value for name, value in TrainingFacts.read(inputs["finetune"]).tags.items() if name == CONTINUES}
    mem_layers = read_config(inputs["finetune"] / MODEL).get("mem_layers")
    params = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "objective": recipe.finetune.objective.kind,
        "context": recipe.finetune.objective.context,
        **({"mem_layers": ", ".join(map(str, mem_layers))} if mem_layers else {}),
        "steps": steps,
        "learning_rate": recipe.finetune.optimizer.learning_rate,
        "zero_stage": recipe.finetune.deepspeed.zero_stage,
        "workers": recipe.resources.workers,
    }
    trainings = [inputs["base"], inputs["finetune"]]
    tasks, model = measured_stages(recipe, inputs), inputs["finetune"] / MODEL
    return make_outcome(recipe.name, tasks, inputs, tags, params, model, trainings)
