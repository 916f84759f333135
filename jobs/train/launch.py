"""Starts a training on Ray and follows it: the driver's side."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.train.spec import CHECKPOINT, METRICS, TrainSpec
from pipelines.progress import Progress, console

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
    interrupt = signal.getsignal(signal.SIGINT)  # Ray Train puts its own handler in place and leaves it there
    with _Follower(spec):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
        finally:
            signal.signal(signal.SIGINT, interrupt)
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
            console.print(f"{snapshot} was cut off by a kill: this training starts again", soft_wrap=True, markup=False)
            shutil.rmtree(directory)
            return


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """What went wrong in the first worker that says so."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        cause = getattr(failures[rank], "cause", None) or failures[rank]
        if isinstance(cause, Exception):
            return cause
    return error


class _Follower:
    """Shows the metrics that rank 0 writes as a progress bar, until the training ends."""

    def __init__(self, spec: TrainSpec) -> None:
        self._metrics, self._steps = spec.output / METRICS, spec.training.steps
        self._progress = Progress(spec.name, self._steps, "steps")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        self._thread.join()
        self._progress.__exit__(*failure)  # type: ignore[arg-type]

    def _follow(self) -> None:
        begun = False
        while not self._end.wait(POLL):
            last = last_metrics(self._metrics)
            if last is None:
                continue
            if not begun:
                begun = True
                self._progress.resume_at(last["step"])
            self._progress.set(last["step"], f"loss {last['loss']:.3f}")


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
