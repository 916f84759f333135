"""Kill -9 at random moments on a cluster of two nodes: the data set is the same, whoever died."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.tokens.shards import Manifest

ROUNDS = 20
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
DRIVER = """
import json, sys
from pathlib import Path
import ray
from pipelines.config import Data
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.units import group_units
from pipelines.workflow.progress import Progress
from pipelines.tokens.tokenize import Encoding, tokenize
address, data, tokenizer, output = sys.argv[1:]
data, output = Data.model_validate_json(data), Path(output)
ray.init(address=address, log_to_driver=False)
units = group_units(list_entries(data, 0, FileHashes(output.parent / "hashes.json")), data.task_bytes)
output.mkdir(exist_ok=True)
print(tokenize(units, data, Encoding(Path(tokenizer), "huggingface", output), Progress("", 1, "B")).hash)
"""


@pytest.fixture
def cluster():
    """A head that runs no tasks, and two nodes that do."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def busy_workers():
    """Processes that run a tokenization task."""
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::tokenize_unit"):
            yield process


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whoever_is_killed_the_data_set_is_the_same(cluster, fresh, write_tree, data_of, tokenizer_directory, contents):
    words = ["cat", "mat", "sat", "é", "漢字", "the", "on"]
    draw = random.Random(0)
    lines = (json.dumps({"id": n, "text": " ".join(draw.choices(words, k=20_000))}) for n in range(150))
    corpus = write_tree(fresh(), {"lines.jsonl": "\n".join(lines)})
    data = data_of(corpus, task_bytes=500_000)

    def start(output):
        arguments = (cluster.address, data.model_dump_json(), str(tokenizer_directory), str(output))
        command = [sys.executable, "-c", DRIVER, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd())

    whole = fresh() / "shards"
    began = time.monotonic()
    driver = start(whole)
    expected, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0, errors
    expected = expected.strip()
    seconds = time.monotonic() - began
    assert expected == Manifest.read(whole).hash
    assert len(Manifest.read(whole).shards) > 20

    killed = []
    for number in range(ROUNDS):
        output = fresh() / "shards"
        driver = start(output)
        while driver.poll() is None:
            time.sleep(draw.uniform(0.2, seconds / 2))
            victim = draw.choice(["worker", "worker", "node", "driver"])
            running = list(busy_workers())
            if driver.poll() is not None or not running:
                continue
            if victim == "worker":
                draw.choice(running).kill()
            elif victim == "node":
                cluster.remove_node(draw.choice(list(cluster.worker_nodes)), allow_graceful=False)
                cluster.add_node(**NODE)
            else:
                driver.send_signal(signal.SIGKILL)
                driver.communicate()
                driver = start(output)
            killed.append(victim)
        printed, errors = driver.communicate(timeout=600)
        assert driver.returncode == 0, errors
        assert expected in printed.splitlines(), f"round {number}, after {killed}"
        assert contents(output) == contents(whole)
    assert {"worker", "node", "driver"} <= set(killed)
    assert len(killed) >= ROUNDS
    print({victim: killed.count(victim) for victim in set(killed)})
