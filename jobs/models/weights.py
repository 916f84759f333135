"""What the weights of a Hugging Face directory are, by the headers of its files: no tensor is read.

Of the files that may lie there, those are looked at that transformers loads. Raises UserError, one line, for files that
are missing, damaged or no weights.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipelines.workflow.errors import UserError
from pipelines.workflow.files import check_fetched

# In the order in which transformers looks for them.
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # behind one of these names: which shard holds which tensor
READABLE = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


@dataclass(frozen=True)
class Header:
    """A tensor's, in one of the files."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(path: Path, named: str | None = None) -> dict[str, Header]:
    """Each tensor of a directory's weights by its name. `named`: the file, or index, that config.json names in place of
    the usual ones (`transformers_weights`)."""
    names = [str(named)] if named else [SAFETENSORS, SAFETENSORS + INDEX, PICKLED, PICKLED + INDEX]
    first = next((path / name for name in names if (path / name).is_file()), None)
    if first is None:
        raise _no_weights(path, named)
    found: dict[str, Header] = {}
    if not first.name.endswith(INDEX):
        return dict(_headers(first))
    index = _read_index(first)
    for shard in sorted(set(index.values())):
        if not (path / shard).is_file():
            raise UserError(f"{path} lacks {shard}, which its {first.name} names: download or copy it again")
        for name, header in _headers(path / shard):
            if name in found:
                raise UserError(
                    f"{path} holds {name} twice, in {found[name].file.name} and {shard}: remove one of them"
                )
            found[name] = header
    for name, shard in index.items():
        if name not in found or found[name].file.name != shard:
            raise UserError(f"{path}: {shard} lacks {name}, which its {first.name} says it holds: download both again")
    return found


def check_dtypes(path: Path, headers: dict[str, Header]) -> None:
    """Raises UserError for numbers that mean nothing without what quantized them."""
    for name, header in headers.items():
        if header.dtype not in READABLE:
            raise UserError(
                f"{path} is quantized ({name} is {header.dtype}): give the model's weights as they were before"
            )


def _no_weights(path: Path, named: str | None) -> UserError:
    if named:
        return UserError(f"{path} lacks {named}, which its config.json names: download or copy it again")
    others = sorted(file.name for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    shards = [name for name in others if "-of-" in name]
    if shards:
        return UserError(
            f"{path} holds {shards[0]}, but no index of its shards ({SAFETENSORS}{INDEX}): download that too"
        )
    if others:
        return UserError(
            f"{path} holds {others[0]}, but no {SAFETENSORS}: give the model's own weights under that name"
        )
    return UserError(f"base.checkpoint {path} holds no weights (*.safetensors): download or convert them")


def _read_index(file: Path) -> dict[str, str]:
    check_fetched(file)
    try:
        index = json.loads(file.read_text())["weight_map"]
        plain = all(Path(shard).name == shard for shard in index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None
    if not index or not plain:
        raise UserError(f"{file} is no index of the shards beside it: download or copy it again")
    return dict(index)


def _headers(file: Path) -> Iterator[tuple[str, Header]]:
    check_fetched(file)
    try:
        yield from _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickled(file)
    except UserError:
        raise
    except Exception as error:  # whatever the readers of two formats say of what comes from outside
        raise _damaged(file, error) from None


def _of_safetensors(file: Path) -> Iterator[tuple[str, Header]]:
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dict
            tensor = weights.get_slice(name)
            yield name, Header(file, tuple(tensor.get_shape()), str(tensor.get_dtype()))


def _of_pickled(file: Path) -> Iterator[tuple[str, Header]]:
    """Of what torch saved: the pickle is read as tensors alone, without their numbers; nothing in it is executed."""
    import torch

    state: Any = torch.load(file, map_location="meta", weights_only=True)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file} holds {name}, which is no tensor: give the model's own weights")
        yield name, Header(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _damaged(file: Path, error: Exception) -> UserError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{file} is damaged ({said}): download or copy it again")
