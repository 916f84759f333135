"""The lock file names exactly what is installed."""

import re
from importlib.metadata import distributions
from pathlib import Path

TORCH_FOR_GPUS = ("nvidia-", "cuda-", "triton")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_installed_package_is_pinned_to_its_version() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    installed = {canonical(found.name): found.version.split("+")[0] for found in distributions()}
    for ours in ("fot", "pip"):
        installed.pop(ours, None)
    # Torch's build for GPUs, which some indexes give, brings packages that its own metadata pins.
    installed = {name: version for name, version in installed.items() if not name.startswith(TORCH_FOR_GPUS)}
    assert {name: pinned.get(name) for name in installed} == installed


def test_the_pins_that_prefect_needs_hold() -> None:
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line and line[0] != "#")
    fastapi, sqlalchemy = (tuple(map(int, pinned[name].split(".")[:2])) for name in ("fastapi", "SQLAlchemy"))
    assert (0, 139) <= fastapi < (0, 151)
    assert (2, 0) <= sqlalchemy < (2, 1)
