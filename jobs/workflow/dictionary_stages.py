"""The dictionary recipe as a workflow: train-N and ask-N for each seed N, then the table and the page."""

import json
from pathlib import Path

from jobs.common.version import code_version
from jobs.config.dictionary import DictionaryRecipe
from jobs.config.train_spec import METRICS, MODEL
from jobs.evaluate.dictionary.accuracy import accuracy, check_memory
from jobs.evaluate.dictionary.result import TASK, dictionary_result
from jobs.evaluate.dictionary.train import model_config, train_seed
from jobs.measures.result import RESULT, Result
from jobs.measures.tables import print_results
from jobs.registry.record import register
from jobs.train.metrics import last_metrics
from jobs.workflow.data_stages import Inputs
from jobs.workflow.outcome import REPORT, make_outcome, report_stage
from jobs.workflow.workspace import WorkDir, duration
from pipelines.workflow.progress import console, say
from pipelines.workflow.store import Stage

ACCURACY = "accuracy.json"


def run_dictionary(recipe: DictionaryRecipe, rebuild: bool) -> None:
    """Train, ask, print, record; with `rebuild` anew what took long and is damaged.

    Raises UserError where the largest memory does not fit."""
    check_memory(model_config(recipe.model), recipe.evaluation)
    work, first = WorkDir(recipe.name, recipe.work_dir, rebuild=rebuild), f"train-{recipe.seeds[0]}"
    with work.with_ray():
        outputs, seconds = work.run(lambda: dictionary_stages(recipe))
        made = {name: output.path for name, output in outputs.items()}
        tags = {"fot.kind": "recipe", "fot.base": "a new model"}
        params = {"seeds": str(list(recipe.seeds)), "steps": recipe.training.steps}
        outcome = make_outcome(recipe.name, [TASK], made, tags, params, made[first] / MODEL)
        recorded = register(outcome, work.directory, recipe.registry)
    print_results([(Result.read(made[TASK]), made[TASK])])
    console.print(f"[bold]{recipe.name}: done in {duration(seconds)}[/bold]")
    say(f"  model (seed {recipe.seeds[0]})  {made[first] / MODEL}")
    say(f"  report          {made['report'] / REPORT}")
    say(f"  MLflow run      {recorded['run_id'] or 'kept for `fot registry sync`'}")


def dictionary_stages(recipe: DictionaryRecipe) -> list[Stage]:
    """In the order in which they are built."""
    stages = [stage for seed in recipe.seeds for stage in (_train_stage(recipe, seed), _ask_stage(recipe, seed))]

    def conclude(output: Path, inputs: Inputs) -> None:
        by_seed = {
            seed: json.loads((inputs[f"ask-{seed}"] / ACCURACY).read_text())["accuracy"] for seed in recipe.seeds
        }
        last = {seed: last_metrics(inputs[f"train-{seed}"] / METRICS) for seed in recipe.seeds}
        minutes = {seed: metrics["cpu_seconds"] / 60 for seed, metrics in last.items() if metrics is not None}
        dictionary_result(by_seed, recipe.evaluation, minutes, output).write(output)

    stages.append(Stage(TASK, conclude, {}, inputs=tuple(stage.name for stage in stages), content=RESULT))
    facts = {"training": f"{recipe.training.steps:,} steps a seed, from nothing", "code": code_version()}
    settings = recipe.model_dump(mode="json", exclude={"work_dir": True, "registry": {"tracking_uri"}})
    made = [stage.name for stage in stages]
    return [*stages, report_stage(recipe.name, [TASK], settings, lambda inputs, results: facts, made)]


def _train_stage(recipe: DictionaryRecipe, seed: int) -> Stage:
    params = {
        "model": recipe.model.model_dump(mode="json"),
        "training": recipe.training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "seed": seed,
    }
    return Stage(f"train-{seed}", lambda output, inputs: train_seed(recipe, seed, output), params, content=f"{MODEL}/")


def _ask_stage(recipe: DictionaryRecipe, seed: int) -> Stage:
    trained = f"train-{seed}"

    def run(output: Path, inputs: Inputs) -> None:
        accuracy(inputs[trained] / MODEL, recipe.evaluation, seed, output)

    params = {"evaluation": recipe.evaluation.model_dump(mode="json", exclude={"batch", "max_gigabytes"}), "seed": seed}
    return Stage(f"ask-{seed}", run, params, inputs=(trained,))
