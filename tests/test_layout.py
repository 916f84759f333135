"""Data flows one way: what each package may import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "fot_model": {"pipelines", "jobs", "ray", "deepspeed", "mlflow"},
    "pipelines": {"jobs", "fot_model", "torch", "deepspeed", "mlflow"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_from_above(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.split(".")[0] for name in names} & FORBIDDEN[package]
            if path.name == "loader.py":  # the thin torch front of the sampler
                found -= {"torch"}
            assert not found, f"{path} imports {found}"


def test_the_readme_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text()
    for package in ("fot_model", "pipelines", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, path
