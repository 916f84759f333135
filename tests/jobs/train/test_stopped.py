"""A training that is asked to stop: it takes a checkpoint, and goes on from there as if nothing had been."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.common.stop import StoppedError, stopping_on_sigterm
from jobs.config.train_spec import CHECKPOINTS, METRICS, TrainSpec
from jobs.train.launch import train
from jobs.train.metrics import last_metrics


def test_a_training_stops_with_a_checkpoint_and_goes_on_bit_for_bit(spec: TrainSpec, changed, losses) -> None:
    train(spec)
    file = spec.output / "asked.stop"
    stopped = replace(changed("stopped", {"checkpoints": {"every": 1000}}), stop=file)

    def ask_after_some_steps() -> None:
        while ((last := last_metrics(stopped.output / METRICS)) is None) or last["step"] < 5:
            time.sleep(0.01)
        file.touch()

    threading.Thread(target=ask_after_some_steps, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at step [0-9]+ of 60, with a checkpoint"):
        train(stopped)
    done = len(losses(stopped.output))
    assert 5 <= done < 60
    assert (stopped.output / CHECKPOINTS / f"step-{done:08d}").is_dir()
    file.unlink()
    train(stopped)
    assert losses(stopped.output) == losses(spec.output)


def test_a_stop_that_comes_after_the_last_step_ends_the_job_after_it(spec: TrainSpec, changed, tmp_path: Path) -> None:
    file = tmp_path / "asked.stop"
    short = replace(changed("short", {"steps": 3}), stop=file, last=1)

    def ask_after_the_last_step() -> None:
        while last_metrics(short.output / METRICS) is None:
            time.sleep(0.01)
        file.touch()

    threading.Thread(target=ask_after_the_last_step, daemon=True).start()
    with stopping_on_sigterm(file), pytest.raises(StoppedError, match="with this stage's work done"):
        train(short)
    assert (short.output / "model" / "model.safetensors").exists()


def test_a_training_that_waits_for_its_workers_stops_at_once(spec: TrainSpec, changed) -> None:
    file = spec.output / "asked.stop"
    waiting = replace(changed("waiting", {"checkpoints": {"every": 1000}}, {"cpus_per_worker": 1000}), stop=file)
    threading.Timer(3, file.touch).start()
    with pytest.raises(StoppedError, match="stopped before its first step"):
        train(waiting)
    file.unlink()
    assert not (waiting.output / METRICS).exists()
