"""A small training, made on the spot: corpus, tokenizer, shards, groups, base; and the same in plain torch."""

import json
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import Module
from torch.optim import Optimizer

from jobs.config.recipe import Recipe
from jobs.config.train_spec import CHECKPOINTS, METRICS, TrainSpec
from jobs.config.training import Training
from jobs.train.batches import batch_shape, make_sampler
from jobs.train.engine import parameter_groups, schedule_factor
from jobs.train.metrics import read_metrics
from jobs.train.model import build_model
from jobs.train.objective import batch_loss
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.index import index_documents
from pipelines.batches.loader import rank_batches
from pipelines.batches.packing import pack_dataset
from pipelines.batches.sampler import IGNORE
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.units import group_units
from pipelines.tokens.tokenize import Encoding, tokenize
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.progress import Progress

Changed = Callable[..., TrainSpec]


@pytest.fixture
def spec(local_ray, recipe: dict, corpus: Path, tmp_path: Path) -> TrainSpec:
    """FoT training of a small random LLaMA, 60 steps on two workers. Short documents beside the long ones make the
    numbers of labels of its micro-batches unequal."""
    short = ("".join(random.Random(n).choices("abcdefgh ", k=1 + n % 9)) for n in range(120))
    lines = [json.dumps({"id": f"s{n}", "text": text}) + "\n" for n, text in enumerate(short)]
    corpus.write_text("".join(lines) + corpus.read_text())
    recipe["finetune"] |= {"steps": 60, "checkpoints": {"every": 10}}
    recipe["finetune"]["optimizer"] |= {"clip": 0.5}
    made = Recipe.model_validate(recipe)
    names = ("tokenizer", "shards", "documents", "groups", "output")
    tokenizer, shards, documents, groups, output = (tmp_path / name for name in names)
    for directory in (tokenizer, shards, documents, groups, output):
        directory.mkdir()
    text = Path(made.data.sources[0].path).read_text()
    train_tokenizer([text], 300, tokenizer)
    entries = list_entries(made.data, 0, FileHashes(tmp_path / "hashes.json"))
    units = group_units(entries, made.data.task_bytes)
    with Progress("shards", 1, "B") as progress:
        tokenize(units, made.data, Encoding(tokenizer, "huggingface", shards), progress)
    index_documents(shards, made.data, documents)
    pack_dataset(shards, documents, ["words"], batch_shape(made.finetune).group_tokens, groups)
    assert made.base.pretrain is not None
    spec = TrainSpec(
        name="test",
        training=made.finetune,
        resources=made.resources,
        data=made.data,
        seed=0,
        base=made.base.pretrain.shape,
        shards=shards,
        documents=documents,
        groups=groups,
        tokenizer=tokenizer,
        output=output,
        logs=tmp_path / "logs",
        checkpoints=str(output / CHECKPOINTS),
        identity={"training": "a test"},
        last=made.finetune.steps,
    )
    torch.manual_seed(1)
    build_model(spec)[0].save_pretrained(tmp_path / "base")
    return replace(spec, base=tmp_path / "base")


@pytest.fixture
def changed(spec: TrainSpec, tmp_path: Path) -> Changed:
    """The training with other settings (`training`, `resources`), under an output directory of the given name."""

    def change(name: str, training: Mapping = {}, resources: Mapping = {}) -> TrainSpec:
        settings = spec.training.model_dump()
        for key, value in training.items():
            merges = isinstance(value, Mapping) and key != "objective"
            settings[key] = {**(settings.get(key) or {}), **value} if merges else value
        output = tmp_path / name
        output.mkdir()
        made = replace(
            spec,
            training=Training.model_validate(settings),
            resources=spec.resources.model_copy(update=dict(resources)),
            output=output,
            checkpoints=str(output / CHECKPOINTS),
            last=int(settings["steps"]),
        )
        if "objective" in settings and made.training.objective.contexts != spec.training.objective.contexts:
            groups = tmp_path / f"{name}-groups"
            groups.mkdir()
            pack_dataset(spec.shards, spec.documents, ["words"], batch_shape(made.training).group_tokens, groups)
            made = replace(made, groups=groups)
        return made

    return change


@pytest.fixture
def losses():
    """Reads the losses of an output, of every step, none missing."""
    return _losses


def _losses(output: Path, first: int = 0) -> list[float]:
    entries = read_metrics(output / METRICS)
    assert [entry["step"] for entry in entries] == list(range(first + 1, first + len(entries) + 1))
    return [entry["loss"] for entry in entries]


@pytest.fixture
def plain_torch_losses():
    """The same training written without Ray and DeepSpeed, in one process."""
    return _plain_torch_losses


def _plain_torch_losses(spec: TrainSpec, without: Collection[int] = (), then: TrainSpec | None = None) -> list[float]:
    """`then`: a training that goes on with the first one's model and optimizer."""
    settings = spec.training.optimizer
    model, _ = build_model(spec)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.betas)
    peaks = [group["lr"] for group in optimizer.param_groups]
    curve = _plain_torch_steps(spec, model, optimizer, peaks, without)
    return curve if then is None else curve + _plain_torch_steps(then, model, optimizer, peaks, without)


def _plain_torch_steps(
    spec: TrainSpec, model: Module, optimizer: Optimizer, peaks: list[float], without: Collection[int]
) -> list[float]:
    training, settings = spec.training, spec.training.optimizer
    dataset = TokenDataset(spec.shards, spec.documents)
    sampler = make_sampler(dataset, spec.groups, training, spec.data, spec.seed, spec.start)
    steps = [step for step in range(spec.first, spec.last) if step not in without]
    batches = rank_batches(sampler, steps, rank=0, world=1)
    curve = []
    for step in steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule_factor(training.schedule, step, training.steps)
        optimizer.zero_grad()
        of_step = [next(batches) for _ in range(training.batch.micro_batches)]
        labels = sum(int((batch.labels != IGNORE).sum()) for batch in of_step)
        loss = sum(batch_loss(model, batch, training.objective, step, spec.seed, labels) for batch in of_step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        curve.append(loss.item())
    return curve
