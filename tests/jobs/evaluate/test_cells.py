import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from jobs.evaluate.cells import CELLS, Cell, check_memory, run_cells
from pipelines.errors import UserError

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
from pipelines.environment import prepare_environment
prepare_environment()
from jobs.evaluate.cells import Cell, run_cells
from pipelines.cluster import ray_cluster

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
