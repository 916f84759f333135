"""Starts a training on Ray and follows it: the driver's side."""

import json
import os
import shutil
import threading
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.train.spec import CHECKPOINT, METRICS, TrainSpec
from pipelines.progress import Progress, say

RAY_DIRECTORY = "ray"
POLL = 1.0  # seconds between looks at the metrics


def train(spec: TrainSpec) -> None:
    """Run a training to its end, from where an earlier run of the same `spec.output` stopped.

    Afterwards `spec.output` holds the exported model, the metrics and the last checkpoint. A lost worker restarts the
    training from the last checkpoint, up to three times.

    Raises what a worker raised.
    """
    if (spec.output / CHECKPOINT).exists():  # all done but for marking the stage complete
        shutil.rmtree(spec.output / RAY_DIRECTORY, ignore_errors=True)
        return
    _drop_damaged_state(spec.output / RAY_DIRECTORY)
    resources = spec.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        _worker,
        train_loop_config=spec,
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(spec.output / RAY_DIRECTORY),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    fit = _Fit(trainer)
    _follow(fit, spec)
    if fit.error is not None:
        raise _cause(fit.error) from fit.error
    result = fit.result
    assert result is not None, "a training that ends without an error has a result"
    assert result.checkpoint is not None, "the last step always saves a checkpoint"
    os.rename(result.checkpoint.path, spec.output / CHECKPOINT)
    shutil.rmtree(spec.output / RAY_DIRECTORY)


def _worker(spec: TrainSpec) -> None:
    from jobs.train.loop import train_loop  # DeepSpeed: seconds and hundreds of megabytes the driver can do without

    train_loop(spec)


def _drop_damaged_state(directory: Path) -> None:
    """Ray Train writes its list of checkpoints in place: a kill in that moment leaves half of it, which it refuses."""
    for snapshot in directory.glob("*/*snapshot*.json"):
        try:
            json.loads(snapshot.read_text())
        except ValueError:
            say(f"{snapshot} was cut off by a kill: this training starts again")
            shutil.rmtree(directory)
            return


def _cause(error: Exception) -> Exception:
    """What went wrong in the first worker that says so."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        cause = getattr(failures[rank], "cause", None) or failures[rank]
        if isinstance(cause, Exception):
            return cause
    return error


class _Fit(threading.Thread):
    """`trainer.fit()` in a thread: in the main one Ray Train takes Ctrl-C for itself and ends the process with 1."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.result: ray.train.Result | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except Exception as error:
            self.error = error


def _follow(fit: _Fit, spec: TrainSpec) -> None:
    """Show the metrics that rank 0 writes as a progress bar, until the training ends."""
    begun = False
    with Progress(spec.name, spec.training.steps, "steps") as progress:
        fit.start()
        while fit.is_alive():
            fit.join(POLL)
            last = last_metrics(spec.output / METRICS)
            if last is not None:
                if not begun:
                    begun = True
                    progress.resume_at(last["step"])
                progress.set(last["step"], f"loss {last['loss']:.3f}")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_metrics(path: Path) -> dict[str, float] | None:
    """The last complete line of a metrics file, None while there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1]) if lines else None
