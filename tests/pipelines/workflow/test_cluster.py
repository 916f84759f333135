import ipaddress
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import ray

from pipelines.workflow.cluster import NODE_TYPE, WantedWorkers, autoscales, run_tasks
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import console


def test_a_ray_of_our_own_listens_on_loopback_only(local_ray) -> None:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    here, listening = psutil.Process(), set()
    for process in [here, *here.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # workers come and go
            listening |= {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    assert listening
    for address in map(ipaddress.ip_address, listening):
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, address


def test_too_many_workers_are_a_users_error_with_the_number_that_fits(local_ray) -> None:
    there = int(ray.cluster_resources()["CPU"])
    WantedWorkers(there, 1, 0, 0).wait()
    with pytest.raises(UserError, match=rf"Ray has room for {there}: .*resources.workers={there}\b"):
        WantedWorkers(there + 1, 1, 0, 0).wait()
    with pytest.raises(UserError, match=r"1000 workers with 1 GPU each do not fit, Ray has room for 0: use a larger"):
        WantedWorkers(1000, 0, 1, 0).wait()
    with pytest.raises(UserError, match=rf"1 workers with {there + 1} CPU each do not fit"):
        WantedWorkers(1, there + 1, 0, 0).wait()


# Running tasks. They are defined inside functions, as Ray sends those by value.


def slots():
    return int(ray.cluster_resources()["CPU"])


def wait_until(there):
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_result_comes_with_its_number(local_ray) -> None:
    n = 5 * slots()
    results = list(run_tasks(lambda one, other: (one, other), [(i, -i) for i in range(n)]))
    assert sorted(results) == [(i, (i, -i)) for i in range(n)]


def test_results_come_as_they_are_done(local_ray, tmp_path) -> None:
    def task(number, path):
        deadline = time.monotonic() + 30
        while number == 0 and not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return number

    n = slots() + 2
    with closing(run_tasks(task, [(number, tmp_path / "go") for number in range(n)])) as results:
        first = [next(results) for _ in range(n - 1)]
        assert sorted(first) == [(number, number) for number in range(1, n)]
        (tmp_path / "go").touch()
        assert list(results) == [(0, 0)]


def test_no_tasks_have_no_results(local_ray) -> None:
    assert list(run_tasks(lambda: 1, [])) == []


def test_few_tasks_are_handed_over_at_a_time(local_ray) -> None:
    """What has not been handed over can still be changed."""
    n = 8 * slots()
    arguments = [("early",)] * n
    results = run_tasks(lambda word: word, arguments)
    got = dict([next(results)])
    arguments[:] = [("late",)] * n
    got |= dict(results)
    assert sorted(got) == list(range(n))
    assert [got[number] for number in range(n)] == ["early"] * 2 * slots() + ["late"] * 6 * slots()


def test_what_a_task_raises_arrives_and_the_others_are_stopped(local_ray, tmp_path) -> None:
    def task(number, directory, others):
        deadline = time.monotonic() + 30
        if number == 0:
            while len(list(directory.glob("*.pid"))) < others and time.monotonic() < deadline:
                time.sleep(0.05)
            raise UserError("this one")
        (directory / f".{number}").write_text(str(os.getpid()))
        (directory / f".{number}").rename(directory / f"{number}.pid")
        time.sleep(300)

    others = slots() - 1
    with pytest.raises(UserError, match="this one") as error:
        list(run_tasks(task, [(number, tmp_path, others) for number in range(4 * slots())]))
    assert str(error.value) == "this one"  # the line alone, without Ray's account of it
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) >= others
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    started = len(list(tmp_path.glob("*.pid")))
    assert list(run_tasks(lambda: 1, [()] * slots())) != []  # all slots are free again
    assert len(list(tmp_path.glob("*.pid"))) == started


def test_tasks_are_stopped_when_nobody_wants_their_results_any_more(local_ray, tmp_path) -> None:
    def task(number, directory):
        if number > 0:
            (directory / f".{number}").write_text(str(os.getpid()))
            (directory / f".{number}").rename(directory / f"{number}.pid")
            time.sleep(300)

    with closing(run_tasks(task, [(number, tmp_path) for number in range(2 * slots())])) as results:
        assert next(results) == (0, None)
        wait_until(lambda: list(tmp_path.glob("*.pid")))
    wait_until(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in tmp_path.glob("*.pid")))


def test_a_task_whose_worker_is_killed_is_run_again(local_ray, tmp_path) -> None:
    def task(number, directory):
        with open(directory / str(number), "a") as runs:
            runs.write("x")
        if number == 1 and (directory / "1").read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    results = list(run_tasks(task, [(number, tmp_path) for number in range(3)]))
    assert sorted(results) == [(0, 0), (1, 1), (2, 2)]
    assert (tmp_path / "1").read_text() == "xx"


def test_a_task_that_raises_is_not_run_again(local_ray, tmp_path) -> None:
    def task(path):
        with open(path, "a") as runs:
            runs.write("x")
        raise ValueError("no use")

    with pytest.raises(ValueError, match="no use"):
        list(run_tasks(task, [(tmp_path / "runs",)]))
    assert (tmp_path / "runs").read_text() == "x"


def test_a_cluster_that_may_grow_is_waited_for_with_a_message_and_a_limit(local_ray, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what tells that this Ray is not ours alone
    there = int(ray.cluster_resources()["CPU"])
    began = time.monotonic()
    with (
        console.capture() as said,
        pytest.raises(UserError, match=rf"room for {there} after 0.05 minutes: .*resources.workers={there}\b"),
    ):
        WantedWorkers(there + 1, 1, 0, 3).wait()
    assert time.monotonic() - began >= 3
    line = f"waiting for room for {there + 1} workers with 1 CPU each, the cluster has room for {there}"
    assert line in said.get().replace("\n", " ")


def test_a_cluster_grows_where_its_nodes_have_types_that_an_autoscaler_gave_or_may_have_given(
    local_ray, monkeypatch
) -> None:
    assert not autoscales()
    for given, grows in {"data": True, "headgroup": True, "local.cluster.node": False}.items():
        nodes = [{"Alive": True, "Labels": {NODE_TYPE: given}}, {"Alive": True, "Labels": {}}]
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        assert autoscales() == grows
    report = b'{"autoscaler_report": {"active_nodes": {"gpu-worker": 1}}}'  # of the first generation
    monkeypatch.setattr("pipelines.workflow.cluster._report", lambda: report)
    assert autoscales()


WAITING = """
import sys
import ray
from pipelines.workflow.cluster import WantedWorkers
ray.init(address=sys.argv[1], log_to_driver=False)
WantedWorkers(2, 1, 0, 120).wait()
print("there")
"""


def test_workers_that_come_are_taken() -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        command = [sys.executable, "-c", WAITING, cluster.address]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        line = next(line for line in waiting.stderr if "waiting for" in line)
        assert "waiting for room for 2 workers with 1 CPU each, the cluster has room for 1" in line
        cluster.add_node(**node)
        assert waiting.communicate(timeout=60)[0] == "there\n"
    finally:
        cluster.shutdown()


def test_a_ray_that_does_not_start_is_a_line_that_names_its_logs(tmp_path: Path) -> None:
    """Here its temporary directory is too deep for the paths of sockets."""
    code = (
        "from pipelines.workflow.environment import prepare_environment; prepare_environment()\n"
        "from pipelines.workflow.cluster import ray_cluster\n"
        "from pipelines.workflow.errors import UserError\n"
        "try:\n    with ray_cluster(): pass\nexcept UserError as error: print(error)\n"
    )
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    environment = {**os.environ, "RAY_TMPDIR": str(deep), "RAY_ADDRESS": ""}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert said.startswith("Ray does not start on this machine (")
    assert said.strip().endswith(f"its logs are in {deep}/ray/session_latest/logs")
