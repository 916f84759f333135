"""Real Ray Train workers with real DeepSpeed."""

import errno
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.config.train_spec import CHECKPOINTS, METRICS, MODEL, TrainSpec
from jobs.train.bad_loss import BadLossError
from jobs.train.batches import NothingNewError
from jobs.train.launch import _worker, told_error, train
from jobs.train.metrics import last_metrics
from pipelines.batches.dataset import DamagedShardError
from pipelines.batches.index import BATCHES
from pipelines.workflow.errors import UserError


def test_zero_on_two_workers_equals_plain_torch_and_a_killed_worker_changes_nothing(
    spec: TrainSpec, changed, losses, plain_torch_losses
) -> None:
    train(spec)
    whole = losses(spec.output)
    assert len(whole) == spec.training.steps
    assert whole == pytest.approx(plain_torch_losses(spec), abs=1e-4)
    assert whole[-1] < whole[0]

    killed = changed("killed")
    victims: list[int] = []

    def kill_a_worker_after_a_checkpoint() -> None:
        while ((last := last_metrics(killed.output / METRICS)) is None) or last["step"] < 15:
            time.sleep(0.01)
        workers = [process for process in psutil.process_iter(["cmdline"]) if _is_worker(process)]
        victims.append(workers[-1].pid)
        os.kill(workers[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, daemon=True)
    killer.start()
    train(killed)
    assert victims
    assert losses(killed.output) == whole  # bit for bit
    for name, tensor in load_file(spec.output / MODEL / "model.safetensors").items():
        assert torch.equal(tensor, load_file(killed.output / MODEL / "model.safetensors")[name])

    model = FotLlamaForCausalLM.from_pretrained(spec.output / MODEL)
    assert model.config.mem_layers == [1]
    assert LlamaForCausalLM.from_pretrained(spec.output / MODEL).config.vocab_size == 300
    assert AutoTokenizer.from_pretrained(spec.output / MODEL).eos_token == "</s>"
    assert (spec.output / CHECKPOINTS / "step-00000060").is_dir()
    train(spec)  # a finished training is not run again
    assert losses(spec.output) == whole


def _is_worker(process: psutil.Process) -> bool:
    return any("ray::RayTrainWorker" in part for part in process.info["cmdline"] or [])


def test_a_workers_error_reaches_the_driver(changed) -> None:
    spec = changed("broken", {}, {"restarts": 0})
    shutil.rmtree(spec.shards)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        train(spec)
    assert not (spec.output / MODEL).exists()


def test_who_follows_a_training_and_fails_ends_it(spec: TrainSpec) -> None:
    def on_metrics(path: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(spec, on_metrics)
    assert not (spec.output / MODEL).exists()


@pytest.mark.slow
def test_a_shard_that_is_damaged_stops_the_training_and_is_named(spec: TrainSpec, losses) -> None:
    shard = next(spec.shards.glob("*.arrow"))
    content = shard.read_bytes()
    tokens = pa.ipc.open_file(spec.documents / BATCHES).get_batch(0)["offset"][0].as_py()
    shard.write_bytes(content[:tokens] + bytes([content[tokens] ^ 1]) + content[tokens + 1 :])
    with pytest.raises(DamagedShardError, match=rf"{shard} is corrupt: rebuild it with `fot data repair RECIPE`"):
        train(spec)
    shard.write_bytes(content)
    train(spec)
    assert len(losses(spec.output)) == spec.training.steps


class UnknownError(ValueError):
    """One that the driver does not know."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (UserError("mend it"), UserError),
        (DamagedShardError("shard-1 is missing"), DamagedShardError),
        (BadLossError(7, "its loss is nan", "lower it"), BadLossError),
        (NothingNewError("there is nothing new"), UserError),
        (ValueError("of the code"), ValueError),
        (KeyError("q"), KeyError),
        (NotImplementedError("not yet"), NotImplementedError),
        (UnknownError("a", "b"), RuntimeError),
        (RuntimeError("connection closed by peer"), None),
        (OSError("stale file handle"), None),
    ],
    ids=repr,
)
def test_what_would_come_again_is_left_for_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, told: type[Exception] | None
) -> None:
    started = []

    def train_loop(spec: object) -> None:
        started.append(spec)
        raise raised

    monkeypatch.setitem(sys.modules, "jobs.train.loop", SimpleNamespace(train_loop=train_loop))
    failure = tmp_path / "failure"
    with pytest.raises(type(raised)):
        _worker({"spec": 1, "failure": failure})
    assert failure.exists() is (told is not None)
    if told is None:
        return
    _worker({"spec": 1, "failure": failure})
    assert len(started) == 1  # not started again
    left = told_error(failure.read_bytes())
    assert type(left) is told
    assert str(raised) in str(left)
    notes = "".join(getattr(left, "__notes__", []))
    assert ("train_loop" in notes) is not isinstance(raised, UserError)
