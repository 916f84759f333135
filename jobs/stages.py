"""The stages of a recipe: what each makes, of what, by which function.

corpus files -> tokenizer -> shards -> base -> finetune -> perplexity, passkey -> register
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.base import asked_mem_layers, check_llama, read_llama_config
from jobs.evaluate.passkey import check_lengths, passkey
from jobs.evaluate.perplexity import Scoring, choose_windows, perplexity
from jobs.plot import plot_perplexity
from jobs.recipe import Recipe, Training
from jobs.registry import Outcome, record
from jobs.train.batches import make_sampler
from jobs.train.launch import read_metrics, train
from jobs.train.spec import METRICS, MODEL, TrainSpec
from jobs.version import code_version
from pipelines.config import Data
from pipelines.corpus import Document, Unit, list_units, read_unit
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.hashing import FileHashes, hash_json
from pipelines.progress import Progress
from pipelines.sampler import is_held_out, split
from pipelines.shards import TokenDataset
from pipelines.store import RECORD, Stage
from pipelines.tokenize import recipe_part, tokenize
from pipelines.tokenizer import import_tokenizer, load_tokenizer, train_tokenizer

Inputs = Mapping[str, Path]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def recipe_stages(recipe: Recipe) -> list[Stage]:
    """The recipe's workflow. Looks at the corpus and the base checkpoint, which name the first stages.

    Raises UserError for what is missing or unusable there.
    """
    work_dir = Path(recipe.work_dir).resolve()
    hashes = FileHashes(work_dir / "file-hashes.json")
    units = list_units(recipe.data, recipe.seed, hashes)
    corpus = hash_json([recipe_part(recipe.data), [unit.identity() for unit in units]])
    stages = [
        _tokenizer_stage(recipe, units, corpus, hashes),
        _shards_stage(recipe, units, corpus),
        _base_stage(recipe, hashes),
        _finetune_stage(recipe),
        _perplexity_stage(recipe),
        _passkey_stage(recipe),
        _register_stage(recipe, work_dir),
    ]
    hashes.save()
    return stages


def _tokenizer_stage(recipe: Recipe, units: list[Unit], corpus: str, hashes: FileHashes) -> Stage:
    given = recipe.tokenizer.path or recipe.base.checkpoint
    if given is None:

        def learn(output: Path, inputs: Inputs) -> None:
            with Progress("tokenizer", sum(unit.bytes for unit in units), "B") as progress:
                train_tokenizer(_training_texts(units, recipe.data, progress), recipe.tokenizer.vocab_size, output)

        params = {"corpus": corpus, "vocab_size": recipe.tokenizer.vocab_size, "held_out": _held_out(recipe)}
        return Stage("tokenizer", learn, params)

    path = Path(given).expanduser().resolve()

    def bring(output: Path, inputs: Inputs) -> None:
        import_tokenizer(path, output)

    files = {name: hash for name, hash in _checkpoint_files(path, hashes).items() if not name.endswith(WEIGHTS)}
    return Stage("tokenizer", bring, {"files": files})


def _training_texts(units: list[Unit], data: Data, progress: Progress) -> Iterator[str]:
    sources = {source.name: source for source in data.sources}
    for unit in units:
        source = sources[unit.source]
        for item in read_unit(unit, source.text_field, source.id_field):
            if isinstance(item, Document) and not is_held_out(item.id, source.held_out):
                yield item.text
        progress.advance(unit.bytes)


def _shards_stage(recipe: Recipe, units: list[Unit], corpus: str) -> Stage:
    def run(output: Path, inputs: Inputs) -> None:
        with Progress("shards", sum(unit.bytes for unit in units), "B") as progress:
            tokenize(units, recipe.data, inputs["tokenizer"], output, progress)
        TokenDataset(output)  # refuses ambiguous document ids

    return Stage("shards", run, {"corpus": corpus}, inputs=("tokenizer",))


def _base_stage(recipe: Recipe, hashes: FileHashes) -> Stage:
    checkpoint, pretrain = recipe.base.checkpoint, recipe.base.pretrain
    if pretrain is not None:

        def make(output: Path, inputs: Inputs) -> None:
            _check_data(recipe, inputs)
            train(_train_spec(recipe, "base", pretrain.training, pretrain.shape, output, inputs))

        params = {"pretrain": _dump(pretrain), **_what_else_decides(recipe)}
        return Stage("base", make, params, inputs=("tokenizer", "shards"), content=MODEL)

    assert checkpoint is not None, "a recipe has one of the two"
    path = Path(checkpoint).expanduser().resolve()
    files = _checkpoint_files(path, hashes)
    config = read_llama_config(path)

    def bring(output: Path, inputs: Inputs) -> None:
        check_llama(path, config, recipe.finetune, load_tokenizer(inputs["tokenizer"]).vocab_size)
        write_atomically(output / "base.json", json.dumps(files, indent=1).encode())
        (output / MODEL).unlink(missing_ok=True)
        (output / MODEL).symlink_to(path, target_is_directory=True)

    needs = {"context": recipe.finetune.objective.context, "mem_layers": asked_mem_layers(recipe.finetune)}
    params = {"path": str(path), "files": files, **needs}
    return Stage("base", bring, params, inputs=("tokenizer",))


def _finetune_stage(recipe: Recipe) -> Stage:
    def run(output: Path, inputs: Inputs) -> None:
        _check_data(recipe, inputs)
        train(_train_spec(recipe, "finetune", recipe.finetune, inputs["base"] / MODEL, output, inputs))

    params = {"training": _dump(recipe.finetune), **_what_else_decides(recipe)}
    return Stage("finetune", run, params, inputs=("tokenizer", "shards", "base"), content=MODEL)


def _perplexity_stage(recipe: Recipe) -> Stage:
    settings, local = recipe.evaluation.perplexity, recipe.finetune.objective.context

    def run(output: Path, inputs: Inputs) -> None:
        memory = _memory_settings(inputs["finetune"] / MODEL)
        results = {
            name: perplexity(
                Scoring(inputs[stage] / MODEL, memory, inputs["shards"], local, settings.contexts),
                recipe.data,
                settings.windows,
                f"ppl {name}",
            )
            for name, stage in (("base", "base"), ("fot", "finetune"))
        }
        write_atomically(output / "perplexity.json", json.dumps({"local_context": local, **results}, indent=1).encode())
        plot_perplexity(results["base"], results["fot"], local, output / "perplexity.png")

    params = {**_dump(settings), "local": local, "held_out": _held_out(recipe)}
    return Stage("perplexity", run, params, inputs=("shards", "base", "finetune"))


def _passkey_stage(recipe: Recipe) -> Stage:
    settings, local = recipe.evaluation.passkey, recipe.finetune.objective.context

    def run(output: Path, inputs: Inputs) -> None:
        results = passkey(
            inputs["finetune"] / MODEL, local, settings.lengths, settings.trials, settings.digits, recipe.seed
        )
        write_atomically(output / "passkey.json", json.dumps({"local_context": local, **results}, indent=1).encode())

    return Stage("passkey", run, {**_dump(settings), "local": local, "seed": recipe.seed}, inputs=("finetune",))


def _register_stage(recipe: Recipe, work_dir: Path) -> Stage:
    """One MLflow run that leads back to everything it came from, and a registered model version."""
    described = recipe.model_dump(mode="json", exclude={"work_dir"})

    def run(output: Path, inputs: Inputs) -> None:
        with Progress("register", 1, "runs") as progress:
            write_atomically(output / "recipe.json", json.dumps(described, indent=1).encode())
            write_atomically(output / "lineage.json", json.dumps(_lineage(inputs), indent=1).encode())
            outcome = _outcome(recipe, hash_json(described), inputs, output)
            write_atomically(output / "run.json", json.dumps(record(outcome, work_dir), indent=1).encode())
            progress.advance(1)

    inputs = ("tokenizer", "shards", "base", "finetune", "perplexity", "passkey")
    return Stage("register", run, {"recipe": described}, inputs=inputs)


def _lineage(inputs: Inputs) -> dict[str, Any]:
    """For every stage: its key, parameters and the hash of each of its files."""
    return {name: json.loads((path / RECORD).read_text()) for name, path in inputs.items()}


def _outcome(recipe: Recipe, recipe_hash: str, inputs: Inputs, output: Path) -> Outcome:
    manifest = TokenDataset(inputs["shards"]).manifest
    results = json.loads((inputs["perplexity"] / "perplexity.json").read_text())
    keys = json.loads((inputs["passkey"] / "passkey.json").read_text())
    local = results["local_context"]
    finished = (inputs["perplexity"] / RECORD).stat().st_mtime
    metrics = [
        (f"{stage}/{name}", float(entry[name]), int(entry["step"]), entry["time"])
        for stage in ("base", "finetune")
        for entry in read_metrics(inputs[stage] / METRICS)
        for name in ("loss", "learning_rate", "tokens_per_second")
    ]
    metrics += [
        (f"perplexity/{model}", value, int(context) * local, finished)
        for model in ("base", "fot")
        for context, value in results[model].items()
    ]
    metrics += [
        (f"passkey/{score}", value, int(length) * local, finished)
        for length, scores in keys.items()
        if length != "local_context"
        for score, value in scores.items()
    ]
    base = inputs["base"] / MODEL
    origin = str(base.resolve()) if base.is_symlink() else f"pre-trained here, stage key {inputs['base'].name}"
    return Outcome(
        key=hash_json([recipe_hash, *(path.name for path in inputs.values())])[:16],
        name=recipe.name,
        tags={
            "fot.recipe": recipe_hash,
            "fot.code": code_version(),
            "fot.manifest": manifest.hash,
            "fot.base": origin,
            "fot.tokens_seen": str(int(read_metrics(inputs["finetune"] / METRICS)[-1]["tokens"])),
        },
        params={
            "recipe": recipe.name,
            "seed": recipe.seed,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "context": local,
            "steps": recipe.finetune.steps,
            "learning_rate": recipe.finetune.optimizer.learning_rate,
            "zero_stage": recipe.finetune.deepspeed.zero_stage,
            "workers": recipe.resources.workers,
        },
        metrics=metrics,
        artifacts={
            "recipe": output / "recipe.json",
            "lineage": output / "lineage.json",
            "perplexity": inputs["perplexity"],
            "passkey": inputs["passkey"],
        },
        model=inputs["finetune"] / MODEL,
    )


def _train_spec(recipe: Recipe, name: str, training: Training, base: Any, output: Path, inputs: Inputs) -> TrainSpec:
    return TrainSpec(
        name=name,
        training=training,
        resources=recipe.resources,
        data=recipe.data,
        seed=recipe.seed,
        base=base,
        dataset=inputs["shards"],
        tokenizer=inputs["tokenizer"],
        output=output,
        logs=Path(recipe.work_dir).resolve() / "logs" / f"{name}-{output.stem}",
    )


def _check_data(recipe: Recipe, inputs: Inputs) -> None:
    """Find out before hours of training whether all that comes after has what it needs."""
    dataset = TokenDataset(inputs["shards"])
    local, settings = recipe.finetune.objective.context, recipe.evaluation
    if recipe.base.pretrain is not None:
        make_sampler(dataset, recipe.base.pretrain.training, recipe.data, recipe.seed)
    make_sampler(dataset, recipe.finetune, recipe.data, recipe.seed)
    choose_windows(dataset, split(dataset, recipe.data)[1], local, max(settings.perplexity.contexts), 1)
    check_lengths(inputs["tokenizer"], local, settings.passkey.lengths, settings.passkey.digits)


def _memory_settings(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    return {name: config[name] for name in ("mem_layers", "mem_positionals")}


def _checkpoint_files(path: Path, hashes: FileHashes) -> dict[str, str]:
    """Content hashes of a model or tokenizer directory's files."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory: give a Hugging Face checkpoint directory")
    return {file.name: hashes.hash(file) for file in sorted(path.iterdir()) if file.is_file()}


def _what_else_decides(recipe: Recipe) -> dict[str, Any]:
    """A training's numbers depend on these too: sums over ranks differ in their last bits with the number of ranks."""
    return {"seed": recipe.seed, "workers": recipe.resources.workers, "held_out": _held_out(recipe)}


def _held_out(recipe: Recipe) -> dict[str, float]:
    return {source.name: source.held_out for source in recipe.data.sources}


def _dump(part: Any) -> dict[str, Any]:
    return dict(part.model_dump(mode="json"))
