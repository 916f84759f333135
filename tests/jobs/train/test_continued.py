"""A training that goes on with another one's: optimizer, step, learning rate; on what is new beside some of the old."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.config.train_spec import METRICS, Start, TrainSpec
from jobs.registry.server import connect, embedded_uri
from jobs.train.batches import NothingNewError, batch_shape, last_step, make_sampler
from jobs.train.launch import train
from jobs.train.metrics import read_metrics
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.fresh import fresh_documents
from pipelines.batches.packing import NEW, Groups, groups_file, pack_dataset, read_groups, write_groups
from pipelines.batches.sampler import CrossBatchSampler
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.units import group_units
from pipelines.tokens.shards import Manifest
from pipelines.tokens.tokenize import Encoding, tokenize
from pipelines.workflow.progress import Progress

NEW_DOCUMENTS = 10


def sampler_of(spec: TrainSpec) -> CrossBatchSampler:
    dataset = TokenDataset(spec.shards, spec.documents)
    return make_sampler(dataset, spec.groups, spec.training, spec.data, spec.seed, spec.start)


@pytest.fixture
def continued(spec: TrainSpec, changed, corpus: Path, tmp_path: Path):
    """A training on the same corpus that goes on with the first, to which the last documents are new; with that many
    groups a new document is read `epochs` times beside a share of old ones."""
    lines = corpus.read_text().splitlines(keepends=True)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (tmp_path / "old.jsonl").write_text("".join(lines[:-NEW_DOCUMENTS]))
    source = spec.data.sources[0].model_copy(update={"path": str(tmp_path / "old.jsonl")})
    data = spec.data.model_copy(update={"sources": (source,)})
    units = group_units(list_entries(data, 0, FileHashes(tmp_path / "hashes.json")), data.task_bytes)
    with Progress("shards", 1, "B") as progress:
        tokenize(units, data, Encoding(spec.tokenizer, "huggingface", earlier), progress)

    def make(name: str, weight: float | None = None, **settings: float) -> TrainSpec:
        groups = tmp_path / f"{name}-groups"
        groups.mkdir()
        tokens = batch_shape(spec.training).group_tokens
        pack_dataset(spec.shards, spec.documents, ["words"], tokens, groups, earlier)
        last = spec.training.steps
        start = Start("models:/fot/tiny/1", spec.checkpoints, last, "x", earlier, "y", tmp_path, **settings)
        source = spec.data.sources[0].model_copy(update={"weight": weight})
        made = replace(changed(name), groups=groups, start=start, identity={"training": name})
        made = replace(made, data=spec.data.model_copy(update={"sources": (source,)}))
        return replace(made, last=last_step(sampler_of(made), made.training, start))

    return make


@pytest.mark.parametrize("weight", [None, 3.0])
@pytest.mark.parametrize(("replay", "epochs"), [(0.0, 1.0), (0.25, 1.0), (0.5, 2.0)])
def test_what_is_new_is_read_as_often_as_asked_beside_a_share_of_the_old(
    continued, spec: TrainSpec, weight: float | None, replay: float, epochs: float
) -> None:
    made = continued("read", weight, replay=replay, epochs=epochs)
    sampler = sampler_of(made)
    fresh = fresh_documents(made.shards, made.start.data)
    assert fresh.sum() == NEW_DOCUMENTS
    read: Counter[tuple[int, int]] = Counter()
    groups = 0
    for step in range(made.first, made.last):
        for micro_batch in range(made.training.batch.micro_batches):
            for source, number in sampler.group_numbers(step, micro_batch):
                groups += 1
                documents = {document for document, _, _ in sampler.groups[source].pieces(number)}
                assert len({bool(fresh[document]) for document in documents}) == 1
                if fresh[next(iter(documents))]:
                    read[source, number] += 1
    there = len(read_groups(made.groups / groups_file(0, NEW)))
    assert len(read) == there  # every one
    assert set(read.values()) <= {int(epochs), int(epochs) + 1}  # the last step is a whole one
    assert read.total() / groups == pytest.approx(1 - replay, abs=0.1)
    assert read.total() >= epochs * there


def test_optimizer_step_and_learning_rate_go_on_as_in_plain_torch(
    spec: TrainSpec, continued, losses, plain_torch_losses
) -> None:
    schedule = spec.training.schedule.model_copy(update={"kind": "inverse_sqrt", "warmup_steps": 8})
    first = replace(spec, training=spec.training.model_copy(update={"schedule": schedule, "steps": 20}), last=20)
    train(first)
    then = continued("then", replay=0.25, epochs=1.0)
    start = replace(then.start, step=20, checkpoints=first.checkpoints)
    then = replace(then, training=first.training, start=start)
    then = replace(then, last=last_step(sampler_of(then), first.training, start))
    assert then.last - 20 > 5
    train(then)
    found = losses(then.output, 20)
    assert losses(first.output) + found == pytest.approx(plain_torch_losses(first, then=then), abs=1e-4)
    rates = [entry["learning_rate"] for entry in read_metrics(then.output / METRICS)]
    assert rates[0] < read_metrics(first.output / METRICS)[-1]["learning_rate"]

    gone = replace(continued("gone", replay=0.25, epochs=1.0), start=replace(start, step=19))
    with pytest.raises(Exception, match="has no whole checkpoint of step 19, which this training goes on from"):
        train(gone)


def test_a_recipe_continues_its_champion_on_new_documents_alone(
    fot_here, recipe: dict, write_recipe, corpus: Path, tmp_path: Path
) -> None:
    recipe["registry"] = {"promote": [{"metric": "perplexity/model", "at": 16, "most": 1e6}]}
    directory = tmp_path / "texts"
    directory.mkdir()
    lines = corpus.read_text().splitlines(keepends=True)
    (directory / "first.jsonl").write_text("".join(lines[:16]))
    recipe["data"]["sources"][0]["path"] = str(directory)
    path = write_recipe(recipe)
    going_on = ("run", path, "--set", "continues.model=models:/fot/tiny@champion")
    nobody = fot_here(*going_on)
    assert (nobody.returncode, "models:/fot/tiny: there is no such model" in nobody.stdout) == (2, True)
    assert fot_here("run", path).returncode == 0

    nothing = fot_here(*going_on)
    assert nothing.returncode == 2
    assert "training tokens that models:/fot/tiny/1 has not read" in nothing.stdout.splitlines()[-1]

    other = fot_here(*going_on, "--set", "finetune.deepspeed.zero_stage=1")
    assert other.returncode == 2
    said = "models:/fot/tiny/1 was trained with finetune.deepspeed.zero_stage 2, the recipe says 1: a training that"
    assert said in other.stdout.splitlines()[-1]

    (directory / "second.jsonl").write_text("".join(lines[16:]))
    answer = fot_here(*going_on)
    assert answer.returncode == 0, answer.stdout
    store = tmp_path / "runs" / "store"
    newest = max((store / "shards").glob("*/manifest.json"), key=lambda file: file.stat().st_mtime).parent
    assert Manifest.read(newest).generations == [1, 1]
    assert len(list((store / "tokenizer").glob("*/stage.json"))) == 1
    trained = sorted(read_metrics(file)[0]["step"] for file in (store / "finetune").glob(f"*/{METRICS}"))
    assert trained == [1, 7]  # the first had 6 steps
    assert len(list((store / "base").glob("*/metrics.jsonl"))) == 1  # the base was not trained again

    client = connect(embedded_uri(tmp_path / "runs"))
    champion = client.get_model_version_by_alias("fot.tiny", "champion")
    assert str(champion.version) == "2"
    tags = client.get_run(champion.run_id).data.tags
    assert tags["fot.continues"] == "models:/fot/tiny/1, step 6"
    tokens = 2 * 2 * 2 * 16  # of a step
    steps = int(client.get_run(champion.run_id).data.params["steps"])
    assert int(tags["fot.tokens_seen"]) == steps * tokens
    assert steps > 6
    shown = fot_here("data", "inspect", path, "--set", "continues.model=models:/fot/tiny/1")
    assert shown.returncode == 0, shown.stdout
    assert [line.split()[0] for line in shown.stdout.splitlines() if line.startswith(("new", "replayed"))] == [
        "new",
        "replayed",
    ]
    assert json.loads(json.dumps(tags))["fot.manifest"] == Manifest.read(newest).hash


def test_too_little_that_is_new_is_one_line(continued) -> None:
    made = continued("little", replay=0.25, epochs=1.0)
    packed = made.groups / groups_file(0, NEW)
    none = np.array([], np.int64)
    packed.unlink()
    write_groups(Groups(np.array([0]), none, none, none, dropped=5), packed)
    message = "continues: the sources have 5 training tokens that models:/fot/tiny/1 has not read, a group takes 32"
    with pytest.raises(NothingNewError, match=message):
        sampler_of(made)
