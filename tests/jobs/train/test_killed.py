"""Kill -9 of workers, nodes and drivers at random moments, on a cluster of two nodes: the training is the same.

pytest tests/jobs/train/test_killed.py -m slow -s      # prints a table of the kills
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs.config.train_spec import METRICS, MODEL
from jobs.train.checkpoint_store import CheckpointStore
from jobs.train.metrics import last_metrics

ROUNDS = 10
VICTIMS = ("worker", "node", "driver")
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
DRIVER = """
import pickle, sys
import ray
from jobs.train.launch import train
ray.init(address=sys.argv[1], log_to_driver=False)
train(pickle.load(open(sys.argv[2], "rb")))
"""


@pytest.fixture
def cluster(local_ray):
    """A head that trains nothing, and two nodes with room for a worker each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whoever_is_killed_whenever_the_losses_are_the_same(changed, losses, cluster, tmp_path) -> None:
    settings = {"steps": 300, "checkpoints": {"every": 7}, "measure": {"every": 50, "contexts": [1, 2], "windows": 4}}
    whole = changed("whole", settings, {"restarts": 5})

    def start(spec):
        file = tmp_path / f"{spec.output.name}.pickle"
        file.write_bytes(pickle.dumps(spec))
        command = [sys.executable, "-c", DRIVER, cluster.address, str(file)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    driver = start(whole)
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0, errors
    expected, weights = losses(whole.output), load_file(whole.output / MODEL / "model.safetensors")
    assert len(expected) == 300

    draw, table = random.Random(0), []
    for number in range(ROUNDS):
        output = tmp_path / f"round{number}"
        output.mkdir()
        spec = replace(whole, output=output, checkpoints=str(output / "checkpoints"))
        victim, moment = VICTIMS[number % len(VICTIMS)], draw.randrange(270)
        driver = start(spec)
        while (last := last_metrics(output / METRICS)) is None or last["step"] < moment:
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.01)
        step, before = int(last["step"]), os.stat(output / METRICS).st_ino
        complete = [found.step for found in CheckpointStore(spec.checkpoints).all() if found.complete]
        if victim == "worker":
            draw.choice(list(workers())).kill()
        elif victim == "node":
            cluster.remove_node(draw.choice(list(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(**NODE)
        else:
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
            driver = start(spec)
        began = time.monotonic()
        while os.stat(output / METRICS).st_ino == before and driver.poll() is None:  # a new start writes it anew
            time.sleep(0.05)
        assert driver.poll() is None, "it ended before the kill could matter"
        back = time.monotonic() - began
        _, errors = driver.communicate(timeout=600)
        assert driver.returncode == 0, errors
        ended = losses(output)
        table.append((number + 1, victim, step, max(complete, default=0), f"{back:.0f} s", ended[-1]))
        assert ended == expected, table[-1]
        again = load_file(output / MODEL / "model.safetensors")
        assert all(torch.equal(weights[name], again[name]) for name in weights)
    print("\n| kill | of a | at step | last checkpoint | trains again after | last loss |")
    print("|---|---|---|---|---|---|")
    for row in table:
        print(f"| {' | '.join(map(str, row))} |")
    print(f"uninterrupted: last loss {expected[-1]}; all 300 losses and all weights equal, bit for bit")


def workers():
    """The training's worker processes."""
    for process in psutil.process_iter(["cmdline"]):
        if any("ray::RayTrainWorker" in part for part in process.info["cmdline"] or []):
            yield process
