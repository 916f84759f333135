"""Memory files that are refused: of another model, of another kind, damaged.

Shapes: B batch, L tokens.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fot_model import FotCache, FotLlamaForCausalLM
from fot_model.cache_file import sampled_fingerprint

WINDOW = 8

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with a local context of 8 tokens."""
    return partial(focused, num_key_value_heads=2, local_context=WINDOW)


def refused(path: Path, model: FotLlamaForCausalLM, error: Any = ValueError) -> str:
    """The one clear line that refuses to load the file, and names it."""
    with pytest.raises(error) as caught:
        FotCache.load(path, model)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "weights": {"seed": 1},
    "memory layers": {"mem_layers": [2]},
    "more memory layers": {"mem_layers": [1, 2]},
    "positions": {"mem_positionals": False},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "heads of another size": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "gate": {"mem_gate": True},
    "activation": {"hidden_act": "gelu"},
    "epsilon of the norms": {"rms_norm_eps": 0.001},
    "depth": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("changes", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_the_file_of_another_model_is_refused(focused, tokens, fresh, changes: dict[str, Any], tmp_path: Path) -> None:
    model = focused()
    fresh(model, tokens(2, 22)).save(tmp_path / "book", model)
    message = refused(tmp_path / "book", focused(**changes))
    assert re.search(r"another model .*: load that model, or read the text again", message)


@torch.enable_grad()
def test_the_file_of_a_model_before_a_small_step_of_fine_tuning_is_refused(
    focused, tokens, fresh, tmp_path: Path
) -> None:
    model = focused()
    fresh(model, tokens(2, 22)).save(tmp_path / "book", model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss.backward()
    optimiser.step()
    assert "another model" in refused(tmp_path / "book", model)


def test_each_end_of_every_parameter_tells_models_apart(focused) -> None:
    model = focused()
    names = {sampled_fingerprint(model)}
    for parameter in model.parameters():
        flat = parameter.view(-1)
        for end in (flat[: len(flat) // 2], flat[len(flat) // 2 :]):
            kept = end.clone()
            end.mul_(1.05)
            names.add(sampled_fingerprint(model))
            end.copy_(kept)
    assert len(names) == 1 + 2 * len(list(model.parameters()))
    assert sampled_fingerprint(model) in names


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_damaged_file_is_refused(focused, tokens, fresh, kept: float, tmp_path: Path) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert "no memory file, or damaged" in refused(path, model)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_is_found(focused, tokens, fresh, where: float, tmp_path: Path) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    whole[header + int(where * (len(whole) - header))] ^= 0x40
    path.write_bytes(whole)
    assert "digest" in refused(path, model)


def test_another_count_of_tokens_in_the_header_is_found(focused, tokens, fresh, tmp_path: Path) -> None:
    model, path = focused(mem_layers=[]), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = path.read_bytes()
    assert b'"left":"16"' in whole
    path.write_bytes(whole.replace(b'"left":"16"', b'"left":"17"'))
    assert "digest" in refused(path, model)


@pytest.fixture(scope="session")
def written_before(focused, tokens, fresh) -> Callable[..., FotCache]:
    """A cache, written in the format before, which had no digest and keys without a lead, with something changed."""

    def write(path: Path, model: FotLlamaForCausalLM, change: Callable[[dict[str, Tensor]], Any]) -> FotCache:
        with torch.no_grad():
            cache = fresh(model, tokens(2, 20), mask=torch.arange(20) >= torch.tensor([[0], [3]]))
        assert cache.local_length == 8
        cache.truncate(15)
        assert cache._lead_B1 is None
        cache.save(path, model)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        change(tensors)
        metadata = {"format": "fot-cache-1", "model": sampled_fingerprint(model), "left": "12"}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return cache

    return write


def test_a_file_of_the_version_before_is_read_on(focused, goes_on, written_before, assert_same, tmp_path: Path) -> None:
    model = focused()
    cache = written_before(tmp_path / "book", model, lambda tensors: None)
    loaded = FotCache.load(tmp_path / "book", model)
    assert (loaded.get_seq_length(), len(loaded.memory), loaded.rows) == (15, 12, 2)
    assert_same(goes_on(model, loaded), goes_on(model, cache))


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "keys shorter than values": (replaced("memory.1.keys", lambda x: x[:, :, :5]), "memory.1.keys"),
    "values shorter than keys": (replaced("memory.1.values", lambda x: x[:, :, :5]), "memory.1.values"),
    "a memory layer missing": (
        lambda tensors: [tensors.pop(f"memory.1.{x}") for x in ("keys", "values", "seen")],
        "memory.1.keys",
    ),
    "values missing": (lambda tensors: tensors.pop("memory.1.values"), "memory.1.values"),
    "a local layer missing": (lambda tensors: tensors.pop("local.2.keys"), "local.2.keys"),
    "a local layer shorter": (replaced("local.2.keys", lambda x: x[:, :, :2]), "local.2.keys"),
    "one row for two": (replaced("memory.1.values", lambda x: x[:1]), "memory.1.values"),
    "one local row for two": (replaced("local.0.values", lambda x: x[:1]), "local.0.values"),
    "heads of another size": (replaced("memory.1.keys", lambda x: x[..., :4]), "memory.1.keys"),
    "padding of another length": (replaced("memory.1.seen", lambda x: x[:, :, :4]), "memory.1.seen"),
    "padding as numbers": (replaced("memory.1.seen", lambda x: x.float()), "memory.1.seen"),
    "keys as whole numbers": (replaced("memory.1.keys", lambda x: x.long()), "memory.1.keys"),
    "something else": (
        lambda tensors: tensors.__setitem__("memory.0.keys", tensors["memory.1.keys"].clone()),
        "memory.0",
    ),
}


@pytest.mark.parametrize(("change", "named"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_whose_parts_do_not_fit_together_is_refused_by_name(
    focused, written_before, change: Callable[[dict[str, Tensor]], Any], named: str, tmp_path: Path
) -> None:
    model = focused()
    written_before(tmp_path / "book", model, change)
    message = refused(tmp_path / "book", model)
    assert "damaged memory file" in message
    assert named in message


@pytest.mark.parametrize("content", [b"", b"Call me Ishmael. " * 99, bytes(200), b"PK\x03\x04" * 99])
def test_a_file_of_another_kind_is_refused(focused, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(content)
    assert "no memory file" in refused(tmp_path / "book.txt", focused())


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "fot-cache-0"}])
def test_a_safetensors_file_of_another_kind_is_refused(
    focused, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    save_file({"seen": torch.ones(2, 2)}, tmp_path / "other.safetensors", metadata)
    assert "FotCache.save writes one" in refused(tmp_path / "other.safetensors", focused())


def test_the_weights_of_a_model_are_no_memory_file(focused, tmp_path: Path) -> None:
    model = focused()
    model.save_pretrained(tmp_path)
    assert "no memory file" in refused(tmp_path / "model.safetensors", model)


def test_a_missing_file_is_refused(focused, tmp_path: Path) -> None:
    refused(tmp_path / "book", focused(), (ValueError, FileNotFoundError))


def test_a_directory_is_refused(focused, tmp_path: Path) -> None:
    refused(tmp_path, focused(), (ValueError, IsADirectoryError))
