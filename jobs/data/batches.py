"""The batches of a training, from its recipe."""

from pathlib import Path

from jobs.train.config import Training
from pipelines.config import Data
from pipelines.dataset import TokenDataset
from pipelines.errors import UserError
from pipelines.sampler import BatchShape, CrossBatchSampler


def batch_shape(training: Training) -> BatchShape:
    """The shape of the batches that a training asks for."""
    batch = training.batch
    return BatchShape(training.objective.context, training.objective.contexts, batch.groups, batch.micro_batches)


def make_sampler(dataset: TokenDataset, groups: Path, training: Training, data: Data, seed: int) -> CrossBatchSampler:
    """Batches over the training documents, in the shape the recipe asks for.

    Raises UserError where they do not fill one micro-batch, and where the steps read a source more often than allowed.
    """
    sampler = CrossBatchSampler.open(dataset, groups, data.sources, batch_shape(training), seed)
    epochs = sampler.epochs(training.steps)
    for number, source in enumerate(data.sources):
        if source.max_epochs is not None and epochs[source.name] > source.max_epochs:
            raise UserError(
                f"{training.steps} steps read source {source.name!r} {epochs[source.name]:.2f} times, "
                f"data.sources.{number}.max_epochs is {source.max_epochs:g}: lower the steps or its weight, or add text"
            )
    return sampler
