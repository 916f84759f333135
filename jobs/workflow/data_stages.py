"""The stages that make a recipe's batches: (checkpoint ->) tokenizer -> shards -> index -> groups.

`checkpoint` is there where the base, whose tokenizer is taken, is no Hugging Face directory yet. `shards` are the
tokens, `index` what each document is used for, `groups` the packing for one shape of training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.config.recipe import Recipe, Texts
from jobs.config.train_spec import MODEL, Start
from jobs.config.training import Training
from jobs.models.checkpoint_source import CHECKPOINT, Located, checkpoint_stage, locate
from jobs.train.batches import batch_shape, make_sampler
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.index import index_documents, is_held_out
from pipelines.batches.packing import pack_dataset
from pipelines.config import Data
from pipelines.sources.corpus import Document, Entry, Unit
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.readers import read_unit
from pipelines.tokens.growth import Generation, next_generation, units_again
from pipelines.tokens.integrity import check_manifest, find_damage, repair
from pipelines.tokens.precheck import check_records
from pipelines.tokens.shards import MANIFEST, Manifest
from pipelines.tokens.tokenize import Encoding, has_begun, recipe_part, tokenize
from pipelines.tokens.tokenizer import BESIDE, CONFIG, JSON, import_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.hashing import hash_file, hash_json
from pipelines.workflow.progress import Progress, human, say
from pipelines.workflow.running import finished_outputs
from pipelines.workflow.store import Output, Stage, Store

Inputs = Mapping[str, Path]
SHARDS, INDEX = "shards", "index"
SAMPLED_UNITS, SAMPLED_TEXTS = 20, 20
# Names begin so.
TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges", "config")


@dataclass(frozen=True)
class Corpus:
    """What the recipe's sources hold now, what data set that comes to, and the tokenizer that belongs to it; where that
    is the base's, also the base, and the stage that makes a directory of it, if it is none."""

    entries: list[Entry]
    generation: Generation
    tokenizer: Stage
    base: Located | None = None
    brought: Stage | None = None

    @property
    def first(self) -> list[Stage]:
        """The stages that tokens are made with."""
        return [self.tokenizer] if self.brought is None else [self.brought, self.tokenizer]


def look_at_corpus(recipe: Texts, store: Store, hashes: FileHashes) -> Corpus:
    """List the sources and find the data set that they continue, if there is one.

    Raises UserError for what is missing or unusable in a source, tokenizer or base.
    """
    checkpoint, own = recipe.base.checkpoint, recipe.tokenizer.path
    base = locate(checkpoint, recipe.base.revision) if checkpoint is not None and own is None else None
    brought = None if base is None else checkpoint_stage(base, hashes)
    there = finished_outputs([] if brought is None else [brought], store)
    entries = list_entries(recipe.data, recipe.seed, hashes)
    part = recipe_part(recipe.data)

    def with_tokenizer(known: list[tuple[Path, Manifest]]) -> tuple[Generation, Stage]:
        generation = next_generation(entries, part, known, recipe.data.task_bytes)
        first = generation.identities[: generation.original]
        return generation, _tokenizer_stage(recipe, entries, first, hashes, base, brought)

    known = []
    for directory, manifest, output in finished_data_sets(store):
        if manifest.recipe != part:
            continue
        generation, tokenizer = with_tokenizer([(directory, manifest)])
        made = all(name in there for name in tokenizer.inputs)
        same_tokenizer = made and output.inputs["tokenizer"] == store.key(tokenizer, there)
        if generation.parent and same_tokenizer and output.params["backend"] == recipe.tokenizer.backend:
            known.append((directory, manifest))
    return Corpus(entries, *with_tokenizer(known), base, brought)


def data_stages(recipe: Recipe, corpus: Corpus, start: Start | None = None) -> list[Stage]:
    """From the corpus to what the recipe's trainings read; with a `start` the base is there already."""
    trainings = recipe.trainings if start is None else {"finetune": recipe.finetune}
    groups = [groups_stage(recipe, f"{name}-groups", training, start) for name, training in trainings.items()]
    return [*corpus.first, shards_stage(recipe, corpus), index_stage(recipe), *groups]


def finished_data_sets(store: Store) -> Iterator[tuple[Path, Manifest, Output]]:
    """Every data set of the store whose manifest is whole; others are named."""
    for output in store.finished(SHARDS):
        file = output.path / MANIFEST
        try:
            whole = hash_file(file) == output.files[MANIFEST][0]
            manifest = Manifest.read(output.path)
        except (OSError, ValueError):
            whole = False
        if whole:
            yield output.path, manifest, output
        else:
            say(f"{output.path} has no whole {MANIFEST}: it is passed over, and made again if it is needed")


def _tokenizer_stage(
    recipe: Texts,
    entries: list[Entry],
    identities: list[dict[str, Any]],
    hashes: FileHashes,
    base: Located | None,
    brought: Stage | None,
) -> Stage:
    """The tokenizer that is given, the base's, or one learned from the corpus: its first generation, so that growth
    keeps it."""
    if brought is not None:

        def take(output: Path, inputs: Inputs) -> None:
            import_tokenizer(str(inputs[CHECKPOINT] / MODEL), output)

        assert base is not None, "it was brought"
        return Stage("tokenizer", take, {}, inputs=(CHECKPOINT,), version=3 if base.kind == "hub" else 2)

    given = recipe.tokenizer.path if base is None else str(base.path)
    if given is None:
        units = [unit for unit in units_again(identities, entries) if unit is not None]

        def learn(output: Path, inputs: Inputs) -> None:
            with Progress("tokenizer", len(units), "units") as progress:
                train_tokenizer(_training_texts(units, recipe.data, progress), recipe.tokenizer.vocab_size, output)

        corpus = hash_json([recipe_part(recipe.data), identities])
        return Stage(
            "tokenizer",
            learn,
            {"corpus": corpus, "vocab_size": recipe.tokenizer.vocab_size, "held_out": held_out(recipe)},
        )

    path = Path(given).expanduser()

    def bring(output: Path, inputs: Inputs) -> None:
        import_tokenizer(str(path) if path.exists() else given, output, recipe.tokenizer.revision)

    if path.is_dir():
        files = directory_files(path, hashes, lambda name: name.startswith(TOKENIZER_FILES))
    elif path.is_file():  # a SentencePiece model; its directory may say which tokens begin and end a text
        files = directory_files(path.parent, hashes, lambda name: name in (path.name, CONFIG, *BESIDE))
    else:
        files = {"hub": given, "revision": recipe.tokenizer.revision or "main"}
    # Version 2 passed over the tokens added to a SentencePiece model.
    may_add = "hub" in files or (JSON not in files and not {CONFIG, *BESIDE}.isdisjoint(files))
    return Stage("tokenizer", bring, {"files": files}, version=3 if may_add else 2)


def _training_texts(units: list[Unit], data: Data, progress: Progress) -> Iterator[str]:
    sources = {source.name: source for source in data.sources}
    for unit in units:
        source = sources[unit.source]
        for item in read_unit(unit, source):
            if isinstance(item, Document) and not is_held_out(item.id, source.held_out):
                yield item.text
        progress.advance(1)


def shards_stage(recipe: Texts, corpus: Corpus) -> Stage:
    """The tokens. Of a damaged data set the damaged shards alone are made again."""
    generation, backend = corpus.generation, recipe.tokenizer.backend

    def run(output: Path, inputs: Inputs) -> None:
        if (output / MANIFEST).exists():
            repair_shards(recipe.data, corpus.entries, inputs["tokenizer"], output)
            return
        if generation.parent is not None:
            repair_shards(recipe.data, corpus.entries, inputs["tokenizer"], generation.parent)
        if not has_begun(output):
            check_records(generation.units, recipe.data, generation.parent)
        encoding = Encoding(inputs["tokenizer"], _choose_backend(recipe, corpus, inputs["tokenizer"]), output)
        with Progress(SHARDS, sum(unit.bytes for unit in generation.units), "B") as progress:
            manifest = tokenize(generation.units, recipe.data, encoding, progress, generation.parent)
        _say(*_summary(manifest))

    params = {
        "corpus": hash_json([recipe_part(recipe.data), generation.identities]),
        "parent": generation.parent_hash,
        "backend": backend,
    }
    return Stage(SHARDS, run, params, inputs=("tokenizer",), content=MANIFEST, mends=True)


def _choose_backend(recipe: Texts, corpus: Corpus, tokenizer: Path) -> str:
    """The backend asked for, if it proves itself on a sample of the corpus; a grown data set keeps its parent's."""
    if corpus.generation.parent is not None:
        return Manifest.read(corpus.generation.parent).tokenizer["backend"]
    if recipe.tokenizer.backend == "gigatoken":
        from pipelines.tokens.gigatoken_check import why_not

        reason = why_not(tokenizer, _sample_texts(corpus.generation.units, recipe.data))
        if reason is not None:
            _say(f"{reason}: going on with Hugging Face tokenizers")
            return "huggingface"
    return recipe.tokenizer.backend


def _sample_texts(units: list[Unit], data: Data) -> Iterator[str]:
    """The first few documents of units from everywhere in the corpus."""
    sources = {source.name: source for source in data.sources}
    for unit in units[:: max(1, len(units) // SAMPLED_UNITS)]:
        texts = (item.text for item in read_unit(unit, sources[unit.source]) if isinstance(item, Document))
        yield from islice(texts, SAMPLED_TEXTS)


def repair_shards(data: Data, entries: Sequence[Entry], tokenizer: Path, directory: Path) -> list[str]:
    """Find the damaged shards of a data set and make them again. Returns what was wrong.

    Raises UserError where recipe, tokenizer or library differ from the manifest's, and where a shard cannot be made as
    it was.
    """
    manifest = Manifest.read(directory)
    encoding = Encoding(tokenizer, manifest.tokenizer["backend"], directory)
    check_manifest(manifest, data, encoding)
    with Progress("verify", len(manifest.shards), "shards") as progress:
        damage = find_damage(directory, manifest, progress)
    with Progress("repair", len(damage), "shards") as progress:
        repair(damage, manifest, entries, data, encoding, progress)
    return list(damage.values())


def _summary(manifest: Manifest) -> Iterator[str]:
    """What tokenization made and what it left out."""
    per_token = manifest.characters / max(1, manifest.tokens)
    yield (
        f"{human(manifest.documents)} documents, {human(manifest.tokens)} tokens, {per_token:.2f} characters a token, "
        f"{len(manifest.shards)} shards ({manifest.generations[-1]} new)"
    )
    for reason, count in sorted(manifest.dropped.items()):
        yield f"left out: {human(count)} ({reason})"


def _say(*lines: str) -> None:
    for line in lines:
        say(f"{'':>15} {line}")


def index_stage(recipe: Texts) -> Stage:
    """The index: what each document is used for."""

    def run(output: Path, inputs: Inputs) -> None:
        with Progress(INDEX, 1, "indexes") as progress:
            report = index_documents(inputs[SHARDS], recipe.data, output)
            progress.advance(1)
        for name, source in report.items():
            uses = ", ".join(f"{human(count)} {use}" for use, (count, _) in source["uses"].items() if count)
            _say(f"{name}: {uses}")

    params = {
        "sources": [source.name for source in recipe.data.sources],
        "held_out": held_out(recipe),
        "duplicates": recipe.data.duplicates,
        "similarity": recipe.data.similarity,
    }
    return Stage(INDEX, run, params, inputs=(SHARDS,), formerly="documents")


def groups_stage(recipe: Texts, name: str, training: Training, start: Start | None = None) -> Stage:
    """The documents packed into groups, for one shape of training; what is new since the `start` apart."""
    shape = batch_shape(training)

    def run(output: Path, inputs: Inputs) -> None:
        sources = [source.name for source in recipe.data.sources]
        with Progress(name, 1, "packings") as progress:
            earlier = None if start is None else start.data
            report = pack_dataset(inputs[SHARDS], inputs[INDEX], sources, shape.group_tokens, output, earlier)
            progress.advance(1)
        dataset = TokenDataset(inputs[SHARDS], inputs[INDEX])
        # Found out now, not after hours of training.
        make_sampler(dataset, output, training, recipe.data, recipe.seed, start)
        for source, counts in report.items():
            used = 1 - counts["dropped"] / max(1, counts["tokens"])
            _say(
                f"{source}: {human(counts['groups'])} groups of {shape.contexts_per_group} x {shape.context} tokens, "
                f"{used:.1%} of {human(counts['tokens'])} tokens used, {human(counts['dropped'])} left over: less than "
                f"a group"
            )

    params: dict[str, Any] = {
        "group_tokens": shape.group_tokens,
        "checked": {  # decides nothing of the groups, but whether the training can read them
            "groups_per_step": [shape.groups_per_micro_batch, shape.micro_batches],
            "steps": training.steps,
            "sources": [[source.weight, source.max_epochs] for source in recipe.data.sources],
        },
    }
    if start is not None:
        params |= {"earlier": start.manifest, "replay": start.replay}
    return Stage(name, run, params, inputs=(SHARDS, INDEX))


def held_out(recipe: Texts) -> dict[str, float]:
    """The share of each source that is kept for evaluation."""
    return {source.name: source.held_out for source in recipe.data.sources}


def directory_files(
    path: Path, hashes: FileHashes, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """Content hashes of a model or tokenizer directory's files, those with a wanted name."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory: give a Hugging Face checkpoint directory")
    return {file.name: hashes.hash(file) for file in sorted(path.iterdir()) if file.is_file() and wanted(file.name)}
