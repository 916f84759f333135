"""The stages of a recipe: what each makes, of what, by which function.

data stages (data_stages.py) -> base -> finetune (training_stages.py) -> evaluations (evaluation_stages.py) -> report

with a probe (probe_stage.py) between base and finetune, where it is to choose the memory layers. A base that is given
comes before the data: nothing is tokenized for one that cannot be used.
"""

from dataclasses import replace
from pathlib import Path

from jobs.config.recipe import Recipe
from jobs.config.training import auto_layers
from jobs.workflow.data_stages import SHARDS, Corpus, Inputs, data_stages, look_at_corpus, repair_shards
from jobs.workflow.evaluation_stages import evaluation_stages
from jobs.workflow.outcome import recipe_report
from jobs.workflow.probe_stage import probe_stage
from jobs.workflow.training_stages import base_stages, finetune_stage
from jobs.workflow.workspace import Workspace
from pipelines.batches.dataset import DamagedShardError
from pipelines.sources.file_hashes import FileHashes
from pipelines.workflow.progress import say
from pipelines.workflow.store import Stage


def recipe_stages(workspace: Workspace) -> list[Stage]:
    """The recipe's workflow. Looks at the corpus and the base checkpoint, which name the first stages.

    Raises UserError for what is missing or unusable there.
    """
    recipe = workspace.recipe
    start = workspace.start
    with workspace.hashes() as hashes:
        corpus = look_at_corpus(recipe, workspace.store, hashes)
        auto = auto_layers(recipe.finetune.objective) if start is None else None  # else they are as they were
        probes = [] if auto is None else [probe_stage(auto, hashes)]
        base = base_stages(workspace, corpus, hashes, start)
        given = [stage for stage in base if SHARDS not in stage.inputs]
        made = [stage for stage in base if SHARDS in stage.inputs]
        readers = [*made, *probes, finetune_stage(workspace, start), *_evaluations(recipe, hashes)]
        data = data_stages(recipe, corpus, start)[len(corpus.first) :]
        stages = [*corpus.first, *given, *data, *(_repairing(recipe, corpus, stage) for stage in readers)]
    return [*stages, recipe_report(recipe, [stage.name for stage in stages])]


def _evaluations(recipe: Recipe, hashes: FileHashes) -> list[Stage]:
    models = {"model": "finetune", "base": "base"}
    return evaluation_stages(recipe.evaluation, models, recipe.evaluated_local, recipe.seed, hashes)


def _repairing(recipe: Recipe, corpus: Corpus, stage: Stage) -> Stage:
    """The stage, which on finding a damaged shard has the data set repaired and goes on, where the recipe says so."""

    def run(output: Path, inputs: Inputs) -> None:
        try:
            stage.run(output, inputs)
        except DamagedShardError as error:
            say(f"{error}: done now, as data.auto_repair says")
            repair_shards(recipe.data, corpus.entries, inputs["tokenizer"], inputs[SHARDS])
            stage.run(output, inputs)

    return replace(stage, run=run) if recipe.data.auto_repair else stage
