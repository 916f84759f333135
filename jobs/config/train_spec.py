"""What a training job is told: everything, in one picklable value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config.recipe import ModelShape
from jobs.config.training import Resources, Training
from pipelines.config import Data

MODEL = "model"  # the exported Hugging Face directory
ADAPTER = "adapter"  # and, where not all of the model was trained, what was
METRICS = "metrics.jsonl"  # a line a step
CHECKPOINTS = "checkpoints"  # of work_dir, where the recipe names no other place


@dataclass(frozen=True)
class Start:
    """Where a training that goes on with another one's begins.

    `model`: the version that is continued; `checkpoints`, `step`: its state, whose content `files` names; `data`: the
    data set it was trained on, of hash `manifest`; `base`: the LLaMA that it began with. `epochs`, `replay`: as in the
    recipe. `mem_layers`: those it was trained with, none where its depth said so.
    """

    model: str
    checkpoints: str
    step: int
    files: str
    data: Path
    manifest: str
    base: Path
    epochs: float
    replay: float
    mem_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainSpec:
    """`base`: a LLaMA directory to start from, or the shape of one to make; `adapter`: of the base, where the training
    starts from both. `shards`, `documents`, `groups`: data set, index and packing. `output`: where results are written;
    `logs`: where workers' output goes. `checkpoints`: a path or URL; `identity`: what decides the training, which a
    checkpoint must have been made with to go on from it. `last`: the step after which it ends; `start`: where it
    begins, if not with the base at step 0; `stop`: a file that asks it to end with a checkpoint, once it is there."""

    name: str
    training: Training
    resources: Resources
    data: Data
    seed: int
    base: Path | ModelShape
    shards: Path
    documents: Path
    groups: Path
    tokenizer: Path
    output: Path
    logs: Path
    checkpoints: str
    identity: Mapping[str, Any]
    last: int
    start: Start | None = None
    stop: Path | None = None
    adapter: Path | None = None

    @property
    def first(self) -> int:
        """The step it begins at."""
        return 0 if self.start is None else self.start.step
