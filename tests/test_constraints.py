"""The lock file names exactly what is installed, and the packages' metadata gives ranges around it."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TORCH_FOR_GPUS = ("nvidia-", "cuda-", "triton")
ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECTS = [ROOT / "pyproject.toml", ROOT / "distribution/fot_model/pyproject.toml"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def requirements(project: Path) -> list[Requirement]:
    """Of a package and all of its extras but those that name its own."""
    metadata = tomllib.loads(project.read_text())["project"]
    lists = [metadata["dependencies"], *metadata.get("optional-dependencies", {}).values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [each for each in found if each.name != metadata["name"]]


def test_every_installed_package_is_pinned_to_its_version() -> None:
    pinned = pins()
    installed = {canonical(found.name): found.version.split("+")[0] for found in distributions()}
    for ours in ("fot", "pip"):
        installed.pop(ours, None)
    # Torch's build for GPUs, which some indexes give, brings packages that its own metadata pins.
    installed = {name: version for name, version in installed.items() if not name.startswith(TORCH_FOR_GPUS)}
    assert {name: pinned.get(name) for name in installed} == installed


NOT_INSTALLED_HERE = {"gcsfs", "google-cloud-storage"}  # extra gs: needs Google's cloud


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_the_metadata_pins_nothing_and_its_ranges_hold_the_pins(project: Path) -> None:
    for needed in requirements(project):
        assert not {each.operator for each in needed.specifier} & {"==", "===", "~="}, needed
        if canonical(needed.name) not in NOT_INSTALLED_HERE:
            assert needed.specifier.contains(pins()[canonical(needed.name)]), needed


def test_the_ranges_of_what_prefect_breaks_with_end_before_it() -> None:
    ranges = {canonical(needed.name): needed.specifier for needed in requirements(PROJECTS[0])}
    assert ranges["fastapi"].contains("0.150.0")
    assert not ranges["fastapi"].contains("0.151.0")
    assert ranges["sqlalchemy"].contains("2.0.58")
    assert not ranges["sqlalchemy"].contains("2.1.0")
