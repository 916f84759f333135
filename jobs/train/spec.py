"""What a training job is told: everything, in one picklable value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.recipe import ModelShape
from jobs.train.config import Resources, Training
from pipelines.config import Data

MODEL = "model"  # the exported Hugging Face directory
METRICS = "metrics.jsonl"  # a line a step
CHECKPOINTS = "checkpoints"  # of work_dir, where the recipe names no other place


@dataclass(frozen=True)
class TrainSpec:
    """`base`: a LLaMA directory to start from, or the shape of one to make. `shards`, `documents`, `groups`: data set,
    index and packing. `output`: where results are written; `logs`: where workers' output goes. `checkpoints`: a path or
    URL; `identity`: what decides the training, which a checkpoint must have been made with to go on from it."""

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
