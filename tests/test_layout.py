"""Data flows one way: what each package may import."""

import ast
import re
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


FOLDERS = sorted({path.parent for top in ("fot_model", "pipelines", "jobs") for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_says_what_lives_in_it(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {name for name in modules | folders if not re.search(rf"\b{name}\b", said)} == set()


def test_the_readme_names_every_folder() -> None:
    listed = re.findall(r"^ *(\w+)/ ", (ROOT / "README.md").read_text(), re.MULTILINE)
    tops = [folder for folder in FOLDERS if len(folder.relative_to(ROOT).parts) <= 2]
    assert {folder.name for folder in tops} <= set(listed)
