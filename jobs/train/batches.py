"""The batches of a training, from its recipe."""

from jobs.recipe import Training
from pipelines.config import Data
from pipelines.sampler import CrossBatchSampler, split
from pipelines.shards import TokenDataset


def make_sampler(dataset: TokenDataset, training: Training, data: Data, seed: int) -> CrossBatchSampler:
    """Batches over the training documents, in the shape the recipe asks for.

    Raises UserError where the documents do not fill one micro-batch.
    """
    return CrossBatchSampler(
        dataset,
        split(dataset, data)[0],
        context=training.objective.context,
        contexts_per_group=len(training.objective.segments),
        groups_per_micro_batch=training.batch.groups,
        micro_batches=training.batch.micro_batches,
        seed=seed,
    )
