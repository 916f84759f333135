"""The batches of a training, from its recipe."""

import math
from bisect import bisect_left
from pathlib import Path

from jobs.config.train_spec import Start
from jobs.config.training import Training
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.mixture import BLOCK
from pipelines.batches.packing import NEW, REPLAYED, Groups, groups_file, join_groups, read_groups
from pipelines.batches.sampler import BatchShape, CrossBatchSampler
from pipelines.config import Data, Source
from pipelines.workflow.errors import UserError


class NothingNewError(UserError):
    """There is nothing that the model to be continued has not read."""


def batch_shape(training: Training) -> BatchShape:
    """The shape of the batches that a training asks for."""
    batch = training.batch
    return BatchShape(training.objective.context, training.objective.contexts, batch.groups, batch.micro_batches)


def make_sampler(
    dataset: TokenDataset, groups: Path, training: Training, data: Data, seed: int, start: Start | None = None
) -> CrossBatchSampler:
    """Batches over the training documents, in the shape the recipe asks for; from a `start` on over what is new since,
    and what is replayed.

    Raises UserError where they do not fill one micro-batch, and where the steps read a source more often than allowed;
    NothingNewError where nothing new fills a group.
    """
    if start is not None:
        parts, sources = _by_age(groups, data, start.replay)
        if not any(map(_is_new, sources)):
            tokens = sum(read_groups(groups / groups_file(number, NEW)).dropped for number in range(len(data.sources)))
            raise NothingNewError(
                f"continues: the sources have {tokens:,} training tokens that {start.model} has not read, a group "
                f"takes {batch_shape(training).group_tokens:,}: add documents, or leave continues out"
            )
        return CrossBatchSampler(dataset, parts, sources, batch_shape(training), seed, start.step)
    sampler = CrossBatchSampler.open(dataset, groups, data.sources, batch_shape(training), seed)
    epochs = sampler.epochs(training.steps)
    for number, source in enumerate(data.sources):
        if source.max_epochs is not None and epochs[source.name] > source.max_epochs:
            raise UserError(
                f"{training.steps} steps read source {source.name!r} {epochs[source.name]:.2f} times, "
                f"data.sources.{number}.max_epochs is {source.max_epochs:g}: lower the steps or its weight, or add text"
            )
    return sampler


def last_step(sampler: CrossBatchSampler, training: Training, start: Start | None) -> int:
    """The step after which a training ends; one that goes on with another's ends when it has read what is new."""
    if start is None:
        return training.steps
    new = {
        source.name: len(own) for source, own in zip(sampler.sources, sampler.groups, strict=True) if _is_new(source)
    }
    wanted = start.epochs * sum(new.values())

    def groups_read(steps: int) -> float:
        epochs = sampler.epochs(steps)
        return sum(epochs[name] * count for name, count in new.items()) + 1e-6  # they are quotients of whole numbers

    share = (1 - start.replay) * sampler.shape.groups_per_step
    at_most = math.ceil((wanted + BLOCK) / share)  # the mixture keeps its shares in every block
    return start.step + bisect_left(range(at_most), wanted, key=groups_read)


def _by_age(groups: Path, data: Data, replay: float) -> tuple[list[Groups], list[Source]]:
    """Groups and weights of what is new and of what is replayed: of each source where the recipe has weights, else of
    all together."""
    parts: list[Groups] = []
    sources: list[Source] = []
    weighted = data.sources[0].weight is not None
    for age, share in ((NEW, 1 - replay), (REPLAYED, replay)):
        packed = [read_groups(groups / groups_file(number, age)) for number in range(len(data.sources))]
        if not weighted:
            packed = [join_groups(packed)]
        there = [(own, source) for own, source in zip(packed, data.sources, strict=False) if len(own) and share > 0]
        total = sum(source.weight or 1.0 for _, source in there)
        for own, source in there:
            name = f"{source.name}, {age}" if weighted else age
            weight = share * (source.weight or 1.0) / total
            parts.append(own)
            sources.append(source.model_copy(update={"name": name, "weight": weight}))
    return parts, sources


def _is_new(source: Source) -> bool:
    return source.name.endswith(NEW)
