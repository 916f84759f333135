"""The stages that train: base (where there is none) and finetune."""

import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from fot_model import default_mem_layers
from jobs.common.stop import StoppedError, stop_file
from jobs.common.version import made_by
from jobs.config.recipe import ModelShape, Recipe
from jobs.config.train_spec import ADAPTER, CHECKPOINTS, METRICS, MODEL, Start, TrainSpec
from jobs.config.training import (
    MemoryRows,
    Objective,
    Patterns,
    Training,
    auto_layers,
    named_layers,
    objective_plugin,
)
from jobs.evaluate import attention_mass, lm_eval_tasks, passkey, perplexity, trec, webquestions
from jobs.measures.windows import choose_windows
from jobs.models.base import (
    asked_mem_layers,
    check_config,
    check_llama,
    check_tokens,
    look_at_checkpoint,
    read_config,
    read_llama_config,
)
from jobs.models.checkpoint_source import CHECKPOINT, Located, checkpoint_stage, locate, read_source_config
from jobs.probe.probing import TASK as PROBE
from jobs.probe.probing import read_chosen
from jobs.registry.server import tracking_uri
from jobs.registry.tracking import TrainingFacts, TrainingRun
from jobs.train.batches import last_step, make_sampler
from jobs.train.checkpoint_store import CheckpointStore, place_of
from jobs.train.export import ADAPTER_FILES, check_adapter
from jobs.train.launch import train
from jobs.workflow.data_stages import INDEX, SHARDS, Corpus, Inputs, directory_files
from jobs.workflow.workspace import Workspace
from pipelines.batches.dataset import TokenDataset
from pipelines.sources.file_hashes import FileHashes
from pipelines.tokens.integrity import check_manifest
from pipelines.tokens.shards import Manifest
from pipelines.tokens.tokenize import Encoding
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.files import write_atomically
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.store import RECORD, Stage, link

CONTINUES = "fot.continues"  # tag: the version that a training goes on with
NOT_DECIDING = {"checkpoints", "measure", "bad_loss"}  # settings that may change while a training goes on


def base_stages(workspace: Workspace, corpus: Corpus, hashes: FileHashes, start: Start | None = None) -> list[Stage]:
    """The LLaMA that is given (or was, where a `start` is gone on from), looked at, or one that is pre-trained; before
    it what makes a directory of it, where that is not the corpus's tokenizer's already.

    Raises UserError for what is no LLaMA.
    """
    recipe = workspace.recipe
    checkpoint, pretrain = recipe.base.checkpoint, recipe.base.pretrain
    if pretrain is not None and start is None:

        def make(output: Path, inputs: Inputs) -> None:
            _run_training(workspace, "base", pretrain.training, pretrain.shape, output, inputs)

        params = {"pretrain": {"shape": _dump(pretrain.shape), "training": _deciding(pretrain.training)}}
        inputs = ("tokenizer", SHARDS, INDEX, "base-groups")
        return [Stage("base", make, {**params, **_what_else_decides(recipe)}, inputs=inputs, content=MODEL)]

    if start is not None:
        located = Located(str(start.base), "directory", start.base)
    else:
        assert checkpoint is not None, "a recipe has one of the two"
        located = corpus.base or locate(checkpoint, recipe.base.revision)
    brought = checkpoint_stage(located, hashes)
    if brought is None:
        look_at_checkpoint(located.path, recipe.base.shape)
        named = {"path": str(located.path), "files": directory_files(located.path, hashes)}
    else:
        if recipe.base.shape is not None or located.kind == "hub":
            check_config(located.named, read_source_config(located), recipe.base.shape)
        named = {"source": located.named, "files": brought.params}
    adapter = None if recipe.base.adapter is None else Path(recipe.base.adapter).expanduser().resolve()
    added = {} if adapter is None else {"adapter": directory_files(adapter, hashes)}

    def bring(output: Path, inputs: Inputs) -> None:
        path = located.path if brought is None else inputs[CHECKPOINT] / MODEL
        tokenizer = load_tokenizer(inputs["tokenizer"])
        config = read_llama_config(path, recipe.base.shape)
        check_llama(path, config, recipe.finetune, tokenizer)
        if recipe.tokenizer.path is not None:
            check_tokens(path, tokenizer)
        write_atomically(output / "base.json", json.dumps(named["files"], indent=1).encode())
        link(path, output / MODEL)
        if adapter is not None:
            check_adapter(adapter, path, recipe.finetune.objective)
            (output / ADAPTER).mkdir(exist_ok=True)
            for name in ADAPTER_FILES:
                write_atomically(output / ADAPTER / name, (adapter / name).read_bytes())

    needs = {"context": recipe.finetune.objective.context, "mem_layers": asked_mem_layers(recipe.finetune)}
    if brought is None:
        return [Stage("base", bring, {**named, **needs, **added}, inputs=("tokenizer",))]
    base = Stage("base", bring, {**named, **needs, **added}, inputs=("tokenizer", CHECKPOINT))
    return [base] if corpus.brought is not None else [brought, base]


def finetune_stage(workspace: Workspace, start: Start | None = None) -> Stage:
    """The base, trained with the recipe's objective; or what was so trained before, from a `start` on."""
    recipe = workspace.recipe

    auto = auto_layers(recipe.finetune.objective)
    probes = () if auto is None or start is not None else (PROBE,)

    def run(output: Path, inputs: Inputs) -> None:
        training = recipe.finetune
        if auto is not None:
            training = training.with_mem_layers(read_chosen(inputs[PROBE]) if start is None else start.mem_layers)
        _run_training(workspace, "finetune", training, inputs["base"] / MODEL, output, inputs, start)

    params = {"training": _deciding(recipe.finetune), **_what_else_decides(recipe), **_continuing(start)}
    inputs = ("tokenizer", SHARDS, INDEX, "finetune-groups", "base", *probes)
    return Stage("finetune", run, params, inputs=inputs, content=MODEL)


def _run_training(
    workspace: Workspace,
    name: str,
    training: Training,
    base: Path | ModelShape,
    output: Path,
    inputs: Inputs,
    start: Start | None = None,
) -> None:
    """The training as an MLflow run, which a training that goes on after a crash continues."""
    recipe, manifest, groups = workspace.recipe, Manifest.read(inputs[SHARDS]), inputs[f"{name}-groups"]
    dataset = TokenDataset(inputs[SHARDS], inputs[INDEX])
    _check_data(recipe, training, dataset, inputs)
    sampler = make_sampler(dataset, groups, training, recipe.data, recipe.seed, start)
    key = f"{name}-{output.stem}"
    where = training.checkpoints.path or str(workspace.directory / CHECKPOINTS)
    read = {"base": "base", "held_out and duplicates": INDEX, "packing": f"{name}-groups"}
    identity = {
        "manifest": manifest.hash,
        **{what: _content(inputs[stage]) for what, stage in read.items() if stage in inputs},
        "shape": _dump(base) if isinstance(base, ModelShape) else None,
        "seed": recipe.seed,
        "sources": _weights(recipe),
        "training": _deciding(training, also={"steps"} if training.schedule.kind != "cosine" else set()),
        **_continuing(start),
    }
    spec = TrainSpec(
        name=name,
        training=training,
        resources=recipe.resources,
        data=recipe.data,
        seed=recipe.seed,
        base=base,
        shards=inputs[SHARDS],
        documents=inputs[INDEX],
        groups=groups,
        tokenizer=inputs["tokenizer"],
        output=output,
        logs=workspace.logs / key,
        checkpoints=place_of(where, name if training.checkpoints.path and start is None else key),
        identity=identity,
        last=last_step(sampler, training, start),
        start=start,
        stop=stop_file(),
        adapter=found if "base" in inputs and (found := inputs["base"] / ADAPTER).exists() else None,
    )
    described, layers = recipe.described(), _mem_layers(training.objective, base)
    tags = {
        "fot.stage": str(output.with_suffix("")),
        "fot.checkpoints": CheckpointStore(spec.checkpoints).name,
        "fot.recipe": hash_json(described),
        **made_by(),
        "fot.manifest": manifest.hash,
        "fot.base": "a new model" if isinstance(base, ModelShape) else origin(base),
        **({} if start is None else {CONTINUES: f"{start.model}, step {start.step}"}),
    }
    facts = TrainingFacts(
        key, recipe.name, f"{recipe.name}: {name}", tags, _params(training, recipe, layers), described
    )
    uri = tracking_uri(workspace.directory, recipe.registry.tracking_uri)
    run = TrainingRun(workspace.directory, uri, facts, output)
    try:
        train(spec, run.update)
    except BaseException as error:
        run.abandon("KILLED" if isinstance(error, KeyboardInterrupt | StoppedError) else "FAILED")
        raise
    run.finish(output / METRICS)


def _check_data(recipe: Recipe, training: Training, dataset: TokenDataset, inputs: Inputs) -> None:
    """Find out before hours of training whether all that comes after has what it needs."""
    backend = dataset.manifest.tokenizer["backend"]
    check_manifest(dataset.manifest, recipe.data, Encoding(inputs["tokenizer"], backend, inputs[SHARDS]))
    local, settings = recipe.finetune.objective.context, recipe.evaluation
    if settings.perplexity is not None:
        perplexity.check_documents(dataset, local, settings.perplexity)
    if settings.attention_mass is not None:
        attention_mass.check_documents(dataset, local, settings.attention_mass)
    if settings.passkey is not None:
        passkey.check_prompt(load_tokenizer(inputs["tokenizer"]), local, settings.passkey)
    if settings.trec is not None:
        trec.check(settings.trec)
    if settings.webquestions is not None:
        webquestions.check(settings.webquestions)
    if settings.lm_eval is not None:
        lm_eval_tasks.check(settings.lm_eval)
    if training.measure is not None:
        choose_windows(dataset, training.objective.context, max(training.measure.contexts), 1, "measure.contexts")


def origin(base: Path) -> str:
    """Where a base model came from: its directory, what a directory was made of, or the stage that trained it."""
    if not base.is_symlink():
        return f"pre-trained here, stage key {base.parent.name}"
    params = json.loads((base.parent / RECORD).read_text())["params"]
    return str(params.get("source") or base.resolve())


def _weights(recipe: Recipe) -> dict[str, float | None]:
    return {source.name: source.weight for source in recipe.data.sources}


def _what_else_decides(recipe: Recipe) -> dict[str, Any]:
    """A training's numbers depend on these too. (On the number of ranks only in the last bits of sums over them.)"""
    return {"seed": recipe.seed, "weights": _weights(recipe)}


def _continuing(start: Start | None) -> dict[str, Any]:
    """What decides a training that goes on with another one's, besides: its state, and how much of what it reads."""
    if start is None:
        return {}
    return {"continues": {"step": start.step, "files": start.files, "epochs": start.epochs, "replay": start.replay}}


def _deciding(training: Training, also: Set[str] = frozenset()) -> dict[str, Any]:
    """What decides a training's numbers: its settings, less those that `also` do not, and the plugin that its objective
    comes from, if it does."""
    plugin = objective_plugin(training.objective.kind)
    made_by = {} if plugin is None else {"plugin": plugin.made_by}
    return {**_dump(training, NOT_DECIDING | also), **made_by}


def _content(output: Path) -> str:
    """The hash that names what a finished stage holds."""
    return str(json.loads((output / RECORD).read_text())["hash"])


def _dump(part: Any, without: Set[str] = frozenset()) -> dict[str, Any]:
    return dict(part.model_dump(mode="json", exclude=set(without)))


def _mem_layers(objective: Objective, base: Path | ModelShape) -> Sequence[int]:
    """The memory layers that the objective comes to with this base."""
    if not isinstance(objective, MemoryRows):
        return ()
    depth = base.num_hidden_layers if isinstance(base, ModelShape) else read_config(base)["num_hidden_layers"]
    return named_layers(objective) or default_mem_layers(depth)


def _params(training: Training, recipe: Recipe, mem_layers: Sequence[int]) -> dict[str, Any]:
    """What people compare trainings by."""
    return {
        "objective": training.objective.kind,
        "train": "patterns" if isinstance(training.train, Patterns) else training.train,
        "context": training.objective.context,
        **({"mem_layers": ", ".join(map(str, mem_layers))} if mem_layers else {}),
        "steps": training.steps,
        "learning_rate": training.optimizer.learning_rate,
        "schedule": training.schedule.kind,
        "zero_stage": training.deepspeed.zero_stage,
        "dtype": training.deepspeed.dtype,
        "seed": recipe.seed,
    }
