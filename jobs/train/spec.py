"""What a training job is told: everything, in one picklable value."""

from dataclasses import dataclass
from pathlib import Path

from jobs.recipe import ModelShape, Resources, Training
from pipelines.config import Data

MODEL = "model"  # the exported Hugging Face directory
METRICS = "metrics.jsonl"  # a line a step
CHECKPOINT = "checkpoint"  # the last DeepSpeed checkpoint, optimizer state included


@dataclass(frozen=True)
class TrainSpec:
    """`base`: a LLaMA directory to start from, or the shape of one to make. `shards`, `documents`, `groups`: data set,
    index and packing. `output`: where results are written; `logs`: where workers' output goes."""

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
