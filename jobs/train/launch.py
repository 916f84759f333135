"""Starts a training on Ray and follows it: the driver's side."""

import builtins
import json
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.common.stop import StoppedError, ending_by_itself
from jobs.config.train_spec import METRICS, MODEL, TrainSpec
from jobs.train.bad_loss import BadLossError
from jobs.train.checkpoint_store import check_identity
from jobs.train.metrics import last_metrics
from pipelines.batches.dataset import DamagedShardError
from pipelines.workflow.cluster import WantedWorkers
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically
from pipelines.workflow.progress import Progress, human

RAY_DIRECTORY = "ray"
POLL = 1.0  # seconds between looks at the metrics
# What would come again on another start: mistakes in the settings, the data or the code. What else is raised may come
# of a node or rank that was lost, of storage that did not answer or of memory that others took.
LASTING = (
    UserError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    NotImplementedError, TypeError, ValueError,
)  # fmt: skip
KINDS: dict[str, Callable[..., Exception]] = {  # that are told by name
    **{kind.__name__: kind for kind in (UserError, StoppedError, BadLossError, DamagedShardError)},
    **{name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, LASTING)},
}
PATIENCE = 7200  # seconds that ranks wait for one that writes or converts a checkpoint; a dead one is seen at once


def train(spec: TrainSpec, on_metrics: Callable[[Path], None] = lambda path: None) -> None:
    """Run a training to its end, from the newest checkpoint of an earlier run with the same settings, if there is one.

    Afterwards `spec.output` holds the exported model and the metrics, and `spec.checkpoints` the last checkpoints.
    A lost worker or node restarts the training from the last checkpoint. `on_metrics` is called with the metrics' file
    every second or so, and at the end.

    Raises UserError where the checkpoints there are of another training and where the cluster lacks the workers for too
    long, StoppedError where it was asked to stop, and what a worker raised.
    """
    if (spec.output / MODEL).exists():  # all done but for marking the stage complete
        on_metrics(spec.output / METRICS)
        return
    assert threading.current_thread() is threading.main_thread(), "Ray Train hands out its controller there alone"
    check_identity(spec.checkpoints, spec.identity)
    # What a worker raises that starting again would not mend; of this start alone.
    failure, ray_directory = spec.output / f".failure-{secrets.token_hex(8)}.tmp", spec.output / RAY_DIRECTORY
    shutil.rmtree(ray_directory, ignore_errors=True)
    resources = spec.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = _Trainer(
        _worker,
        train_loop_config={"spec": spec, "failure": failure},
        torch_config=TorchConfig("nccl" if resources.gpus_per_worker else "gloo", timeout_s=PATIENCE),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(ray_directory),  # it wants one; our checkpoints are not its business
            failure_config=ray.train.FailureConfig(max_failures=resources.restarts),
        ),
    )
    follower = _Follower(spec, on_metrics, trainer.abort)
    fit_error: Exception | None = None
    with ending_by_itself():
        follower.start()
        try:
            trainer.fit()
        except Exception as caught:
            fit_error = caught
        finally:
            follower.end()
            on_metrics(spec.output / METRICS)
        if follower.error is not None:
            raise follower.error
        if failure.exists():
            error = told_error(failure.read_bytes())
            failure.unlink()
            raise error
        if fit_error is not None:
            raise _cause(fit_error) from fit_error
        shutil.rmtree(ray_directory)


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs, and starts again after any error. One that would come again is left for the driver, and a
    worker that finds one returns at once."""
    from jobs.train.loop import train_loop  # DeepSpeed: seconds and hundreds of megabytes the driver can do without

    failure: Path = config["failure"]
    if failure.exists():
        return
    try:
        train_loop(config["spec"])
    except LASTING as error:
        write_atomically(failure, tell_error(error))
        raise


def tell_error(error: Exception) -> bytes:
    """The error as JSON: it goes over a disk, from which nothing is unpickled; of a bug also where it came from."""
    note = "" if isinstance(error, UserError) else "in a worker:\n" + "".join(traceback.format_exception(error))
    told = {"kind": type(error).__name__, "mistake": isinstance(error, UserError), "text": str(error), "note": note}
    try:
        return json.dumps({**told, "arguments": error.__reduce__()[1]}).encode()
    except (TypeError, ValueError):  # they are more than numbers and texts
        return json.dumps({**told, "arguments": None}).encode()


def told_error(content: bytes) -> Exception:
    """What `tell_error` told: of its own kind where that is known here, with a note that the traceback shows."""
    told = json.loads(content)
    kind, arguments = KINDS.get(told["kind"]), told["arguments"]
    if kind is not None and arguments is not None:
        error = kind(*arguments)
    elif told["mistake"]:
        error = UserError(told["text"])
    else:
        error = RuntimeError(f"{told['kind']}: {told['text']}")
    if told["note"]:
        error.add_note(told["note"])
    return error


def _cause(error: Exception) -> Exception:
    """What went wrong in the first worker that says so."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        cause = getattr(failures[rank], "cause", None) or failures[rank]
        if isinstance(cause, Exception):
            return cause
    return error


class _Trainer(TorchTrainer):
    """Ray Train's, but that Ctrl-C is a KeyboardInterrupt here: its own handler ends the process with 1. And another
    thread can end it."""

    _controller: ActorHandle | None = None
    _aborted = False

    def abort(self) -> None:
        """End the training, from another thread: `fit` raises."""
        self._aborted = True
        if self._controller is not None:
            ray.kill(self._controller)

    def _register_sigint_handler(self, controller: ActorHandle) -> None:  # what `fit` calls when it has its controller
        self._controller = controller
        if self._aborted:
            ray.kill(controller)


class _Follower(threading.Thread):
    """Shows the metrics that rank 0 writes as a progress bar while the main thread is in `fit`, and aborts that where
    it cannot go on. Ray must not be shut down before `end`: it ends a process that uses it afterwards."""

    def __init__(self, spec: TrainSpec, on_metrics: Callable[[Path], None], abort: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._spec, self._on_metrics, self._abort = spec, on_metrics, abort
        self._ended = threading.Event()
        self.error: Exception | None = None

    def end(self) -> None:
        self._ended.set()
        while self.is_alive():
            with suppress(KeyboardInterrupt):  # a second Ctrl-C changes nothing
                self.join()

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self.error = error
            self._abort()

    def _follow(self) -> None:
        spec, begun, resources = self._spec, False, self._spec.resources
        wanted = WantedWorkers(
            resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, 60 * resources.wait_minutes
        )
        before = last_metrics(spec.output / METRICS)
        with Progress(spec.name, spec.last, "steps") as progress:
            while not self._ended.is_set():
                self._ended.wait(POLL)
                if wanted.grows and not self._ended.is_set():
                    wanted.check()  # a node that was lost may not come back
                self._on_metrics(spec.output / METRICS)
                last = last_metrics(spec.output / METRICS)
                if last == before and spec.stop is not None and spec.stop.exists():
                    raise StoppedError("stopped before its first step")  # workers look only between steps
                if last is not None:
                    if not begun:
                        begun = True
                        progress.resume_at(last["step"])
                    progress.set(last["step"], progress_note(last))


def progress_note(last: dict[str, float]) -> str:
    """What a person sees of a step: 'loss 2.345, 12.3k tokens/s, MFU 43 %, 3.4 GB'."""
    parts = [f"loss {last['loss']:.3f}", f"{human(last['tokens_per_second'])} tokens/s"]
    if "mfu" in last:
        parts.append(f"MFU {last['mfu']:.0%}")
    parts.append(f"{last['memory_gb']:.1f} GB")
    if last["skipped_steps"]:
        parts.append(f"{last['skipped_steps']:.0f} skipped")
    return ", ".join(parts)
