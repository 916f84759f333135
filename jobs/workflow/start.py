"""Finding where a training that goes on with another one's begins: what trained a registered model, and on what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.config.recipe import Recipe
from jobs.config.train_spec import MODEL, Start
from jobs.config.training import Continued, auto_layers
from jobs.registry.models import find_version, model_address
from jobs.registry.runs import children
from jobs.registry.server import connect, talking_to, tracking_uri
from jobs.train.checkpoint_store import CheckpointStore, difference
from jobs.workflow.data_stages import finished_data_sets
from pipelines.sources.formats import is_url
from pipelines.workflow.credentials import shown_url
from pipelines.workflow.errors import UserError
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.store import Store


def find_start(recipe: Recipe, continued: Continued, work_dir: Path, store: Store) -> Start:
    """The last checkpoint of the registered model that the recipe continues.

    Raises UserError where there is no such model, where its checkpoint, its data set or its base is gone, and where the
    recipe would train something else.
    """
    model, where = _trained_by(continued, tracking_uri(work_dir, recipe.registry.tracking_uri))
    where = _with_options(where, recipe.finetune.checkpoints.path)
    complete = [found for found in CheckpointStore(where).all() if found.complete]
    if not complete:
        raise UserError(f"{model}: its checkpoints in {CheckpointStore(where).name} are gone: it cannot be continued")
    last = complete[-1]
    identity = last.records[0].identity
    mem_layers = tuple(identity["training"]["objective"].get("mem_layers") or ())
    ours = recipe.finetune.with_mem_layers(mem_layers) if auto_layers(recipe.finetune.objective) else recipe.finetune
    if other := difference(_same(identity["training"]), _same(json.loads(ours.model_dump_json()))):
        key, theirs, asked = other
        raise UserError(
            f"{model} was trained with finetune.{key} {json.dumps(theirs)}, the recipe says {json.dumps(asked)}: a "
            f"training that goes on keeps it"
        )
    data = [directory for directory, manifest, _ in finished_data_sets(store) if manifest.hash == identity["manifest"]]
    bases = [output.path for output in store.finished("base") if output.hash == identity["base"]]
    for found, what in ((data, "data set"), (bases, "base")):
        if not found:
            raise UserError(f"{model}: the {what} it was trained with is not in {store.root}: run in its work_dir")
    return Start(
        model=model,
        checkpoints=where,
        step=last.step,
        files=hash_json({name: list(file) for name, file in last.files.items()}),
        data=data[0],
        manifest=identity["manifest"],
        base=(bases[0] / MODEL).resolve(),
        epochs=continued.epochs,
        replay=continued.replay,
        mem_layers=mem_layers,
    )


def _same(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's model and optimizer are shaped by."""
    groups = {"groups": training["optimizer"]["groups"]}
    trained = {"train": training.get("train"), "lora": training.get("lora")}
    return {"objective": training["objective"], "deepspeed": training["deepspeed"], "optimizer": groups, **trained}


def _trained_by(continued: Continued, uri: str) -> tuple[str, str]:
    """The version that is continued, and the checkpoints of its training."""
    address = model_address(continued.model)
    with talking_to(uri):
        client = connect(uri)
        version = find_version(client, address)
        trainings = children(client, client.get_run(version.run_id))
    shown = f"{address.shown}/{version.version}"
    if not trainings or not (where := trainings[-1].data.tags.get("fot.checkpoints")):
        raise UserError(f"{shown}: its run {version.run_id} has no training with checkpoints: it cannot be continued")
    return shown, where


def _with_options(where: str, path: str | None) -> str:
    """The place with what the recipe's own URL says after the question mark (an endpoint, say): runs do not show it."""
    if path is None or not is_url(path) or not where.startswith(shown_url(path)):
        return where
    _, mark, options = path.partition("?")
    return f"{where}{mark}{options}"
