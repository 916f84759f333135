import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs.models.weights import check_dtypes, read_headers
from pipelines.workflow.errors import UserError

TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n"


def shards(path: Path, kind: str, **where: str) -> None:
    """Each tensor in the file that is named for it, and an index that says so."""
    for file in set(where.values()):
        held = {name: TENSORS[name] for name, its in where.items() if its == file}
        save_file(held, path / file) if kind == "model.safetensors" else torch.save(held, path / file)
    (path / f"{kind}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "bin shards", "named"])
def test_shapes_and_types_are_read_of_every_form(tmp_path: Path, form: str) -> None:
    match form:
        case "safetensors":
            save_file(TENSORS, tmp_path / "model.safetensors")
            torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")  # which transformers passes over
        case "bin":
            torch.save(TENSORS, tmp_path / "pytorch_model.bin")
        case "shards":
            shards(tmp_path, "model.safetensors", a="1-of-2.safetensors", b="2-of-2.safetensors")
        case "bin shards":
            shards(tmp_path, "pytorch_model.bin", a="1.bin", b="2.bin")
        case "named":
            save_file(TENSORS, tmp_path / "mine.safetensors")
    headers = read_headers(tmp_path, "mine.safetensors" if form == "named" else None)
    assert {name: header.shape for name, header in headers.items()} == {"a": (2, 3), "b": (4,)}
    check_dtypes(tmp_path, headers)


def refused(path: Path, named: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_dtypes(path, read_headers(path, named))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    assert "holds no weights (*.safetensors)" in refused(tmp_path)
    assert "lacks mine.safetensors, which its config.json names" in refused(tmp_path, "mine.safetensors")
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    assert "holds consolidated.safetensors, but no model.safetensors" in refused(tmp_path)
    save_file(TENSORS, tmp_path / "model-00001-of-00001.safetensors")
    assert "holds model-00001-of-00001.safetensors, but no index of its shards" in refused(tmp_path)


def test_an_index_that_is_not_of_the_shards_beside_it_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, "model.safetensors", a="1.safetensors", b="2.safetensors")
    (tmp_path / "2.safetensors").unlink()
    assert "lacks 2.safetensors, which its model.safetensors.index.json names" in refused(tmp_path)
    save_file({"c": TENSORS["b"]}, tmp_path / "2.safetensors")
    assert "2.safetensors lacks b, which its model.safetensors.index.json says it holds" in refused(tmp_path)
    save_file(TENSORS, tmp_path / "2.safetensors")
    assert "holds a twice, in 1.safetensors and 2.safetensors" in refused(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        assert "index.json is damaged (" in refused(tmp_path)
    for content in ({}, {"a": "../1.safetensors"}):
        index.write_text(json.dumps({"weight_map": content}))
        assert "is no index of the shards beside it" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_what_git_lfs_did_not_fetch_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LFS)
    assert refused(tmp_path).endswith(
        f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull` where it lies"
    )


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_damaged(tmp_path: Path, name: str, kept: int) -> None:
    file = tmp_path / name
    save_file(TENSORS, file) if file.suffix == ".safetensors" else torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{name} is damaged (" in refused(tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("made-by-a-pickle"),))


def test_a_pickle_is_not_executed_and_holds_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged (" in refused(tmp_path)
    assert not (tmp_path / "made-by-a-pickle").exists()
    torch.save({"step": 7}, tmp_path / "pytorch_model.bin")
    assert "holds step, which is no tensor" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_numbers_that_something_quantized_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(2).to(dtype)}, tmp_path / "model.safetensors")
    assert "is quantized (a is " in refused(tmp_path)
