"""What a job looks at on the cluster before it does anything."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs.cluster import preflight
from jobs.cluster.package import load_all
from jobs.cluster.preflight import check_code, check_limits, check_nodes, check_places, unseen
from jobs.common.version import code_version
from pipelines.workflow.errors import UserError


def test_a_limit_of_the_cluster_is_on_what_all_training_workers_take(recipe, write_recipe, monkeypatch) -> None:
    asked = load_all(write_recipe(recipe), ["resources.cpus_per_worker=3", "resources.gpus_per_worker=1"])
    for limits in ({}, {"CPU": "6"}, {"CPU": "6", "GPU": "2"}, {"CPU": ""}):
        for kind, name in preflight.LIMITS.items():
            monkeypatch.setenv(name, limits[kind]) if kind in limits else monkeypatch.delenv(name, raising=False)
        check_limits(asked)
    monkeypatch.setenv("FOT_MAX_GPUS", "1")
    with pytest.raises(UserError, match=r"take 2 GPUs, this cluster allows a job 1 \(FOT_MAX_GPUS\)"):
        check_limits(asked)
    monkeypatch.setenv("FOT_MAX_CPUS", "5")
    with pytest.raises(UserError, match="take 6 CPUs, this cluster allows a job 5"):
        check_limits(asked)
    for wrong in ("many", "0", "-1"):
        monkeypatch.setenv("FOT_MAX_CPUS", wrong)
        with pytest.raises(UserError, match=f"FOT_MAX_CPUS={wrong} in the environment of the cluster's nodes: make"):
            check_limits(asked)


def test_a_limit_is_on_every_variant(recipe, write_recipe, monkeypatch) -> None:
    monkeypatch.setenv("FOT_MAX_CPUS", "3")
    variants = {"plain": {}, "thick": {"set": {"resources.cpus_per_worker": 2}}}
    with pytest.raises(UserError, match=r"^variant thick: resources: .* take 4 CPUs, this cluster allows a job 3"):
        check_limits(load_all(write_recipe({**recipe, "variants": variants})))


def test_another_version_of_the_code_is_refused() -> None:
    check_code(code_version())
    with pytest.raises(UserError, match=re.escape(f"the cluster has fot {code_version()}, who submitted has 9.9")):
        check_code("9.9")


def test_what_is_written_needs_a_directory_that_is_there_and_can_be_written(tmp_path: Path, monkeypatch) -> None:
    check_places({"work_dir": str(tmp_path / "new"), "finetune": {"checkpoints": {"path": "s3://b/x"}}})
    with pytest.raises(
        UserError, match=f"work_dir {tmp_path}/a/b: the cluster has no directory {tmp_path}/a: set work_dir"
    ):
        check_places({"work_dir": str(tmp_path / "a" / "b")})
    with pytest.raises(UserError, match=r"finetune\.checkpoints\.path .* the cluster has no directory"):
        check_places({"work_dir": str(tmp_path), "finetune": {"checkpoints": {"path": "/nowhere/x"}}})
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"the cluster may not write to {tmp_path}"):
        check_places({"work_dir": str(tmp_path)})


def test_a_node_misses_the_first_path_that_it_does_not_see(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "PATIENCE", 0.0)
    probe = tmp_path / "runs" / "jobs" / "x.yaml"
    probe.parent.mkdir(parents=True)
    probe.touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "[odd].txt").touch()
    there = [("data.sources.0.path", str(tmp_path / name)) for name in ("a.txt", "*.txt", "[odd].txt")]
    assert unseen(there, probe) is None
    gone = ("base.checkpoint", str(tmp_path / "llama"))
    assert unseen([*there, gone, gone], probe) == f"base.checkpoint {tmp_path}/llama"
    assert unseen([("data.sources.1.path", str(tmp_path / "*.gz"))], probe) == f"data.sources.1.path {tmp_path}/*.gz"
    probe.unlink()
    assert unseen(there, probe) == f"work_dir {tmp_path}/runs, as the head has it"


@pytest.fixture
def hanging(local_ray, tmp_path: Path, monkeypatch) -> Iterator[dict]:
    """This machine as a node on which looking at a path does not end before the test does."""
    over = tmp_path / "over"

    def hang(paths: list, probe: Path) -> None:
        while not over.exists():
            time.sleep(0.1)

    monkeypatch.setattr(preflight, "unseen", hang)
    monkeypatch.setattr(preflight, "ANSWER", 0.1)
    (node,) = ray.nodes()
    yield node
    over.touch()


def test_all_nodes_look(local_ray, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert check_nodes({"base": {"checkpoint": str(tmp_path)}}, tmp_path / "runs") == 1
    with pytest.raises(
        UserError, match=f"node .* of the cluster does not see base.checkpoint {tmp_path}/llama: put it"
    ):
        check_nodes({"base": {"checkpoint": str(tmp_path / "llama")}}, tmp_path / "runs")


def test_a_node_that_hangs_is_named(hanging: dict, tmp_path: Path) -> None:
    host = hanging["NodeManagerAddress"]
    with pytest.raises(UserError, match=f"^node {host} of the cluster has not said .*: mend the file systems"):
        check_nodes({}, tmp_path / "runs")


def test_a_node_that_died_meanwhile_is_passed_over(hanging: dict, tmp_path: Path, monkeypatch) -> None:
    answers = iter([[hanging], [{**hanging, "Alive": False}]])
    monkeypatch.setattr(ray, "nodes", lambda: next(answers))
    assert check_nodes({}, tmp_path / "runs") == 0


def test_what_is_wrong_on_a_node_is_told_unless_it_died(local_ray, tmp_path: Path, monkeypatch) -> None:
    def fail(paths: list, probe: Path) -> None:
        raise OSError("lost")

    monkeypatch.setattr(preflight, "unseen", fail)
    (node,) = ray.nodes()
    with pytest.raises(
        UserError, match=f"^node {node['NodeManagerAddress']} cannot run this job's code: OSError: lost"
    ):
        check_nodes({}, tmp_path / "runs")
    answers = iter([[node], [{**node, "Alive": False}]])
    monkeypatch.setattr(ray, "nodes", lambda: next(answers))
    assert check_nodes({}, tmp_path / "runs") == 0
