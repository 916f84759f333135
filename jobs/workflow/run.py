"""`fot run` and `fot status`: a recipe's workflow in this process, with Ray beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.config.dictionary import load_dictionary
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.train_spec import METRICS, MODEL
from jobs.config.variants import Comparison, load_comparison
from jobs.measures.tables import print_results
from jobs.registry.record import register
from jobs.train.metrics import last_metrics
from jobs.workflow.comparison import TASK as COMPARISON
from jobs.workflow.comparison import comparison_stages
from jobs.workflow.dictionary_stages import dictionary_stages, run_dictionary
from jobs.workflow.evaluation_stages import read_results
from jobs.workflow.outcome import REPORT, make_outcome, measured_stages, recipe_outcome
from jobs.workflow.stages import recipe_stages
from jobs.workflow.workspace import WorkDir, Workspace, duration
from pipelines.workflow.cluster import WantedWorkers, autoscales
from pipelines.workflow.progress import console, say
from pipelines.workflow.running import Around, as_it_is, finished_outputs, workflow_status
from pipelines.workflow.store import Output, Stage, Store


@dataclass(frozen=True)
class MadeRecipe:
    """What a recipe came to: its stages' outputs, where they lie, what MLflow has of it, and how long it took."""

    outputs: Mapping[str, Output]
    paths: Mapping[str, Path]
    recorded: Mapping[str, str | None]
    seconds: float


def run_recipe(path: Path, overrides: Sequence[str], rebuild: bool = False) -> None:
    """Run everything that is not done yet and print what was made; with `rebuild` also what took long and is damaged.

    Raises UserError for a mistake in recipe, corpus, checkpoint or machine.
    """
    if (dictionary := load_dictionary(path, overrides)) is not None:
        run_dictionary(dictionary, rebuild)
        return
    if (comparison := load_comparison(path, overrides)) is not None:
        _run_comparison(comparison, rebuild)
        return
    workspace = Workspace(load_recipe(path, overrides), rebuild=rebuild)
    with workspace.with_ray():
        made = make(workspace)
    print_results(read_results(measured_stages(workspace.recipe, made.paths), made.paths))
    _say_done(workspace.recipe, made)


def _run_comparison(comparison: Comparison, rebuild: bool) -> None:
    """The variants one after the other, then side by side."""
    work = WorkDir(comparison.common.name, comparison.common.work_dir, rebuild=rebuild)
    made: dict[str, MadeRecipe] = {}
    with work.with_ray():
        for name, variant in comparison.variants.items():
            base = None if variant.after is None else made[variant.after].paths["finetune"] / MODEL
            workspace = Workspace(comparison.recipe(name, base), rebuild=rebuild)
            made[name] = make(workspace)
            _say_done(workspace.recipe, made[name])
        stages, outputs = comparison_stages(comparison, {name: each.outputs for name, each in made.items()})
        for stage in stages:
            outputs[stage.name] = work.store.build(stage, outputs, say)
        paths = {stage.name: outputs[stage.name].path for stage in stages}
        outcome = make_outcome(comparison.common.name, [COMPARISON], paths, {"fot.kind": "comparison"})
        recorded = register(outcome, work.directory, comparison.common.registry)
    print_results(read_results([COMPARISON], paths))
    say(f"  report      {paths['report'] / REPORT}")
    say(f"  MLflow run  {recorded['run_id'] or 'kept for `fot registry sync`'}")


def make(workspace: Workspace, around: Around = as_it_is) -> MadeRecipe:
    """The recipe's stages, on the Ray there is, and what came of them in MLflow."""
    outputs, seconds = workspace.run(lambda: _stages_with_workers(workspace), around)
    recipe, paths = workspace.recipe, {name: output.path for name, output in outputs.items()}
    recorded = register(recipe_outcome(recipe, paths), workspace.directory, recipe.registry)
    return MadeRecipe(outputs, paths, recorded, seconds)


def _stages_with_workers(workspace: Workspace) -> list[Stage]:
    """The recipe's stages, once the cluster has room for the workers that some of them need; one that launches nodes by
    itself does so when a training asks for them."""
    stages, resources = recipe_stages(workspace), workspace.recipe.resources
    if not autoscales():
        patience = 60 * resources.wait_minutes
        WantedWorkers(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, patience).wait()
    return stages


def show_status(path: Path, overrides: Sequence[str]) -> None:
    """Print the stages with state, duration and output; those of every variant, where there are any."""
    print(f"{'stage':>15}  {'state':<24}  {'duration':>8}  output")
    for title, stages, store in _workflows(path, overrides):
        if title:
            print(title)
        for stage, state, seconds, where in workflow_status(stages, store):
            detail = ""
            if state in ("running", "interrupted") and (last := last_metrics(Path(where) / METRICS)):
                detail = f" at step {last['step']}"
            print(f"{stage.name:>15}  {state + detail:<24}  {duration(seconds) if seconds else '':>8}  {where}")


def _workflows(path: Path, overrides: Sequence[str]) -> Iterator[tuple[str, list[Stage], Store]]:
    """(title, stages, store) of a recipe, or of each of its variants; no stages where its base is not made yet."""
    if (dictionary := load_dictionary(path, overrides)) is not None:
        yield "", dictionary_stages(dictionary), WorkDir(dictionary.name, dictionary.work_dir).store
        return
    if (comparison := load_comparison(path, overrides)) is None:
        workspace = Workspace(load_recipe(path, overrides))
        yield "", recipe_stages(workspace), workspace.store
        return
    models: dict[str, Path] = {}
    for name, variant in comparison.variants.items():
        base = models.get(variant.after or "")
        workspace = Workspace(comparison.recipe(name, base))
        if variant.after is not None and base is None:
            yield f"{name}: waits for {variant.after}", [], workspace.store
            continue
        stages = recipe_stages(workspace)
        if (trained := finished_outputs(stages, workspace.store).get("finetune")) is not None:
            models[name] = trained.path / MODEL
        yield name, stages, workspace.store


def _say_done(recipe: Recipe, made: MadeRecipe) -> None:
    """What was made, where it lies, how to look at it."""
    lines = {
        "model (Hugging Face directory)": made.paths["finetune"] / MODEL,
        "token shards and manifest": made.paths["shards"],
        "report": made.paths["report"] / REPORT,
        "MLflow run": made.recorded["run_id"] or "kept for `fot registry sync`",
    }
    if made.recorded["version"] is not None:
        lines["registered model"] = f"models:/fot/{recipe.name}/{made.recorded['version']} ({made.recorded['gate']})"
        lines["runs, plots and models"] = f"fot registry ui --work-dir {recipe.work_dir}"
    console.print(f"[bold]{recipe.name}: done in {duration(made.seconds)}[/bold]")
    for what, where in lines.items():  # a line each, never folded, so that paths can be copied
        say(f"  {what:<{max(map(len, lines))}}  {where}")
