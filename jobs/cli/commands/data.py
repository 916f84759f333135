"""`fot data ...`: make a recipe's data, check it, mend it, look at it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.cli.views.data import batch_view, licence_view, plan_view, sample_view, source_view, training_view
from jobs.common.terminal import print_lines
from jobs.config.recipe import load_recipe
from jobs.train.batches import last_step, make_sampler
from jobs.workflow.data_stages import (
    INDEX,
    SHARDS,
    Corpus,
    data_stages,
    finished_data_sets,
    look_at_corpus,
    repair_shards,
)
from jobs.workflow.workspace import Workspace
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.sampler import CrossBatchSampler
from pipelines.tokens.growth import finished_generation
from pipelines.tokens.integrity import check_manifest, find_damage, recipe_difference
from pipelines.tokens.shards import Manifest
from pipelines.tokens.tokenize import Encoding
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import Progress, say
from pipelines.workflow.running import finished_outputs
from pipelines.workflow.store import Output, damage_of

SAMPLES = 3


def prepare(path: Path, overrides: Sequence[str]) -> None:
    """Build everything that the recipe's trainings read, and nothing more."""
    workspace = Workspace(load_recipe(path, overrides))
    with workspace.with_ray():
        outputs, _ = workspace.run(lambda: data_stages(workspace.recipe, _corpus(workspace), workspace.start))
    print_lines([f"manifest {Manifest.read(outputs[SHARDS].path).hash} in {outputs[SHARDS].path}"])


def verify(path: Path, overrides: Sequence[str]) -> None:
    """Compare the data with its checksums and counts. Raises UserError where something is damaged."""
    workspace = Workspace(load_recipe(path, overrides))
    corpus, outputs = _newest(workspace)
    directory = outputs[SHARDS].path
    manifest = Manifest.read(directory)
    backend = manifest.tokenizer["backend"]
    check_manifest(manifest, workspace.recipe.data, Encoding(outputs["tokenizer"].path, backend, directory))
    with workspace.with_ray(), Progress("verify", len(manifest.shards), "shards") as progress:
        damage = list(find_damage(directory, manifest, progress).values())
    for stage in data_stages(workspace.recipe, corpus, workspace.start):
        if stage.name not in outputs:
            damage.append(f"{workspace.store.root / stage.name} does not have what this recipe needs")
        elif stage.name != SHARDS:
            damage += [f"{file} is {what}" for file, what in damage_of(outputs[stage.name]).items()]
    print_lines(damage)
    if damage:
        raise UserError(f"{len(damage)} damaged or missing: mend it with `fot data repair {path}`")
    print(
        f"{len(manifest.shards)} shards with {manifest.documents} documents and {manifest.tokens} tokens are what the "
        f"manifest says ({manifest.hash[:16]} in {directory})"
    )


def repair(path: Path, overrides: Sequence[str]) -> None:
    """Make what is damaged again, as it was. Raises UserError where it cannot be."""
    workspace = Workspace(load_recipe(path, overrides), rebuild=True)
    corpus, outputs = _newest(workspace)
    directory = outputs[SHARDS].path
    with workspace.with_ray():
        with workspace.store.locked(directory):
            damage = repair_shards(workspace.recipe.data, corpus.entries, outputs["tokenizer"].path, directory)
        mended = [f"{line}; it is made again" for line in damage]
        for stage in data_stages(workspace.recipe, corpus, workspace.start):
            output = workspace.store.build(stage, outputs, mended.append)
            if stage.name not in outputs:
                mended.append(f"{output.path} was missing; it is made again")
            outputs[stage.name] = output
    print_lines(mended)
    print("everything is as it was made" if mended else "nothing is damaged")


def show(path: Path, overrides: Sequence[str], step: int, training: str) -> None:
    """Print the batch of a step: which documents, from which sources, and which serve which as negatives."""
    workspace, sampler, _ = _open(path, overrides, training)
    recipe = workspace.recipe
    print_lines(batch_view(sampler, recipe.trainings[training].objective, step, recipe.seed))


def inspect(path: Path, overrides: Sequence[str], training: str) -> None:
    """Print sources, document lengths, what the training reads, and a few samples with the plan."""
    workspace, sampler, outputs = _open(path, overrides, training)
    recipe = workspace.recipe
    settings = recipe.trainings[training]
    objective, first = settings.objective, sampler.first
    last = last_step(sampler, settings, workspace.start)
    batch = sampler.micro_batch(first, 0)
    manifest = Manifest.read(outputs[SHARDS].path)
    views = [
        source_view(outputs[INDEX].path, recipe.data.sources),
        *([licence_view(manifest)] if manifest.licences else []),
        training_view(sampler, training, last),
        sample_view(sampler, load_tokenizer(outputs["tokenizer"].path), SAMPLES),
        plan_view(batch, objective, first, recipe.seed),
    ]
    for number, view in enumerate(views):
        print_lines([*([] if number == 0 else [""]), *view])


def _open(
    path: Path, overrides: Sequence[str], training: str
) -> tuple[Workspace, CrossBatchSampler, dict[str, Output]]:
    workspace = Workspace(load_recipe(path, overrides))
    recipe = workspace.recipe
    if training not in recipe.trainings:
        raise UserError(f"--training {training}: the recipe trains {' and '.join(recipe.trainings)}")
    _, outputs = _newest(workspace)
    groups = f"{training}-groups"
    if groups not in outputs:
        raise UserError(f"the data is not packed for {training} yet: make it with `fot data prepare {path}`")
    if damaged := [*damage_of(outputs[INDEX]), *damage_of(outputs[groups])]:
        raise UserError(f"{damaged[0]} is damaged: mend it with `fot data repair {path}`")
    dataset = TokenDataset(outputs[SHARDS].path, outputs[INDEX].path)
    settings = recipe.trainings[training]
    sampler = make_sampler(dataset, outputs[groups].path, settings, recipe.data, recipe.seed, workspace.start)
    return workspace, sampler, outputs


def _corpus(workspace: Workspace) -> Corpus:
    with workspace.hashes() as hashes:
        return look_at_corpus(workspace.recipe, workspace.store, hashes)


def _newest(workspace: Workspace) -> tuple[Corpus, dict[str, Output]]:
    """The corpus, and the newest finished data set made of it with what was made of that."""
    corpus = _corpus(workspace)
    if corpus.generation.parent is None:
        remedy = "make it with `fot data prepare RECIPE`"
        for directory, manifest, _ in finished_data_sets(workspace.store):
            if differs := recipe_difference(manifest, workspace.recipe.data):
                remedy += f", or go back to what {directory} was made with, which was another {differs}"
                break
        raise UserError(f"there is no data set of this recipe in {workspace.store.root}: {remedy}")
    if corpus.generation.units:
        new = len({entry for unit in corpus.generation.units for entry in unit.entries})
        say(f"{new} new files are not in the data set yet: `fot data prepare RECIPE` adds them")
    directory = corpus.generation.parent
    corpus = replace(corpus, generation=finished_generation(directory, Manifest.read(directory)))
    return corpus, finished_outputs(data_stages(workspace.recipe, corpus, workspace.start), workspace.store)
