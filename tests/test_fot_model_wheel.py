"""`fot-model`: the model as a wheel of its own, built from this tree, works without the rest of the project."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OWN = ROOT / "distribution/fot_model"


def project(directory: Path) -> dict:
    return tomllib.loads((directory / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built beside the tree: a build leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(OWN, copy / "distribution/fot_model", symlinks=True)
    shutil.copytree(ROOT / "fot_model", copy / "fot_model", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", copy, copy / "distribution/fot_model"], check=True)
    (made,) = copy.glob("*.whl")
    return made


def test_the_wheel_holds_the_model_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        packed = {name: file.read(name) for name in file.namelist() if ".dist-info/" not in name}
        (licence,) = [file.read(name) for name in file.namelist() if name.endswith("licenses/LICENSE")]
        (metadata,) = [file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    sources = {f"fot_model/{path.name}": path.read_bytes() for path in (ROOT / "fot_model").glob("*.py")}
    assert not [path for path in (ROOT / "fot_model").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert packed == sources
    assert licence == (ROOT / "LICENSE").read_bytes()
    needed = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert {Requirement(each).name for each in needed} == {"safetensors", "torch", "transformers"}


def test_it_needs_what_its_modules_import(wheel: Path) -> None:
    imported: set[str] = set()
    for path in (ROOT / "fot_model").glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # accelerate is imported in a function, of models that it loaded
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    needed = {Requirement(each).name for each in project(OWN)["dependencies"]}
    assert imported - sys.stdlib_module_names - {"fot_model"} == needed


def test_its_version_and_ranges_are_those_of_the_whole_package() -> None:
    whole, own = project(ROOT), project(OWN)
    assert set(own["dependencies"]) <= set(whole["dependencies"])
    for name in ("version", "requires-python", "license", "license-files"):
        assert own[name] == whole[name]


USE = """
import sys
sys.path.insert(0, {wheel!r})
import torch
import fot_model
from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM
assert fot_model.__file__.startswith({wheel!r}), fot_model.__file__
config = FotLlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, mem_layers=[1], local_context=8, eos_token_id=None)
model = FotLlamaForCausalLM(config).eval()
ids = torch.arange(35)[None]
cache = FotCache(config)
logits = model(ids, past_key_values=cache).logits
assert logits.shape == (1, 35, 40) and logits.isfinite().all()
assert len(cache.memory) > 0
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"jobs", "pipelines", "ray", "deepspeed", "mlflow"}}))
"""


def test_a_model_reads_with_nothing_but_the_wheel_torch_and_transformers(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", USE.format(wheel=str(wheel))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
