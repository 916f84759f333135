import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

from jobs.evaluate import cells as module
from jobs.evaluate.cells import CELLS, WORKER_BYTES, Cell, check_gpu, check_memory, run_cells
from pipelines.workflow.errors import UserError

pytestmark = pytest.mark.usefixtures("local_ray")


def mark(directory: str, name: str) -> dict[str, str]:
    with open(Path(directory) / name, "a") as file:
        file.write("run\n")
    return {"name": name}


def marking(directory: Path, names: str, size: int = 0) -> list[Cell]:
    return [Cell(name, mark, (str(directory), name), 10, size, f"cell {name}") for name in names]


def runs(directory: Path, names: str) -> list[int]:
    return [(directory / name).read_text().count("run") for name in names]


def test_every_cell_is_run_once_and_its_result_kept(tmp_path: Path) -> None:
    found = run_cells("t", marking(tmp_path, "abc"), tmp_path)
    assert found == {name: {"name": name} for name in "abc"}
    assert {file.stem for file in (tmp_path / CELLS).iterdir()} == set("abc")
    assert run_cells("t", marking(tmp_path, "cbad"), tmp_path) == {name: {"name": name} for name in "cbad"}
    assert runs(tmp_path, "abcd") == [1, 1, 1, 1]


def test_a_result_that_is_not_whole_is_measured_again(tmp_path: Path) -> None:
    run_cells("t", marking(tmp_path, "ab"), tmp_path)
    (tmp_path / CELLS / "a.json").write_text('{"name"')
    run_cells("t", marking(tmp_path, "ab"), tmp_path)
    assert runs(tmp_path, "ab") == [2, 1]


DRIVER = """
import sys, time
from pathlib import Path
from pipelines.workflow.environment import prepare_environment
prepare_environment()
from jobs.evaluate.cells import Cell, run_cells
from pipelines.workflow.cluster import ray_cluster

def measure(directory, name):
    with open(Path(directory) / name, "a") as file:
        file.write("run\\n")
    if name == "c":
        time.sleep(300)
    return {"name": name}

output = Path(sys.argv[1])
with ray_cluster():
    run_cells("t", [Cell(name, measure, (str(output), name), 10, 0, name) for name in "abcd"], output)
"""


def test_what_a_killed_evaluation_had_measured_is_not_measured_again(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "c").exists() or not all((tmp_path / CELLS / f"{name}.json").exists() for name in "ab"):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert not (tmp_path / CELLS / "c.json").exists()
    found = run_cells("t", marking(tmp_path, "abcd"), tmp_path)
    assert found == {name: {"name": name} for name in "abcd"}
    assert runs(tmp_path, "abc") == [1, 1, 2]


def test_a_cell_too_large_for_every_node_is_one_line_with_the_estimate_before_anything_runs(tmp_path: Path) -> None:
    there = max(node["Resources"].get("memory", 0) for node in ray.nodes())
    cells = [*marking(tmp_path, "a"), *marking(tmp_path, "b", size=int(there))]
    with pytest.raises(UserError, match=r"cell b needs about [\d.]+ GB, the largest node has [\d.]+ GB") as error:
        run_cells("t", cells, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()
    check_memory(marking(tmp_path, "a"))


def test_what_a_cell_raises_ends_the_evaluation_and_keeps_the_others(tmp_path: Path) -> None:
    bad = Cell("z", mark, (str(tmp_path / "nowhere"), "z"), 10, 0, "cell z")
    with pytest.raises(FileNotFoundError):
        run_cells("t", [*marking(tmp_path, "a"), bad], tmp_path)
    run_cells("t", marking(tmp_path, "a"), tmp_path)
    kept = json.loads((tmp_path / CELLS / "a.json").read_text())
    assert kept == {"name": "a"}


GB = 10**9


def test_with_gpus_a_cell_must_fit_a_node_that_has_one_and_holds_its_weights_alone_there(monkeypatch) -> None:
    large, with_gpu = {"memory": 100 * GB}, {"memory": 4 * GB, "GPU": 1}
    nodes = [{"Alive": True, "Resources": large}, {"Alive": True, "Resources": with_gpu}]
    cell = Cell("a", mark, (), 10, 50 * GB, "cell a", weights=2 * GB)
    monkeypatch.setattr(ray, "nodes", lambda: nodes[:1])
    check_memory([cell])
    assert module._node_bytes(cell, module._gpus()) == WORKER_BYTES + 50 * GB
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    check_memory([cell])
    assert module._node_bytes(cell, module._gpus()) == WORKER_BYTES + 2 * GB
    with pytest.raises(UserError, match=r"cell a needs about 4.7 GB, the largest node has 4.0 GB"):
        check_memory([Cell("a", mark, (), 10, 50 * GB, "cell a", weights=4 * GB)])


def test_in_its_task_a_cell_must_fit_the_gpu_beside_what_others_hold_there(monkeypatch) -> None:
    cell = Cell("a", mark, (), 10, 3 * GB, "cell a")
    check_gpu(cell)  # there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GB, 8 * GB))
    for own in (0, GB):  # what the worker holds already, such as the weights, it uses again
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda own=own: own)
        if own:
            check_gpu(cell)
            continue
        with pytest.raises(
            UserError, match=r"cell a needs about 3.0 GB, the GPU has 2.0 GB for it: shorten it"
        ) as error:
            module._run(cell, ())
        assert "\n" not in str(error.value)
