"""Memory files: what was saved is read on.

Shapes: B batch, L tokens.
"""

import copy
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fot_model import DenseMemory, FotCache, FotLlamaForCausalLM, TopKMemory
from fot_model.cache_file import sampled_fingerprint

WINDOW = 8

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with a local context of 8 tokens."""
    return partial(focused, num_key_value_heads=2, local_context=WINDOW)


MEMORIES: dict[str, tuple[Callable[[], DenseMemory | None], type]] = {  # and what names the file
    "its own": (lambda: None, Path),
    "its own, path as text": (lambda: None, str),
    "dense": (DenseMemory, Path),
    "top-k": (partial(TopKMemory, 3), Path),
}


@pytest.mark.parametrize(("make", "kind_of_path"), MEMORIES.values(), ids=MEMORIES)
def test_a_saved_cache_goes_on_bit_for_bit(
    focused,
    tokens,
    left_padding,
    fresh,
    goes_on,
    assert_same,
    setup,
    make: Callable[[], DenseMemory | None],
    kind_of_path: type,
    tmp_path: Path,
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    path = kind_of_path(tmp_path / "book")
    cache = fresh(model, tokens(3, 22), mask=left_padding(is_padded, 22), memory=make())
    cache.save(path, model)
    loaded = FotCache.load(path, focused(**changes), make())
    assert [child.name for child in tmp_path.iterdir()] == ["book"]
    assert (loaded.get_seq_length(), loaded.local_length, loaded.rows) == (22, cache.local_length, 3)
    assert_same(loaded.memory.state_dict(), cache.memory.state_dict(), 0)
    assert {name: held.dtype for name, held in loaded.memory.state_dict().items()} == {
        name: held.dtype for name, held in cache.memory.state_dict().items()
    }
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)
    loaded.truncate(25)
    cache.truncate(25)
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)


def test_what_a_dense_memory_saved_a_top_k_memory_takes(
    focused, tokens, left_padding, fresh, goes_on, assert_same, setup, tmp_path: Path
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(is_padded, 22))
    cache.save(tmp_path / "book", model)
    loaded = FotCache.load(tmp_path / "book", model, TopKMemory(3))
    top_k = TopKMemory(3)
    top_k.load_state_dict(cache.memory.state_dict())
    cache.memory = top_k
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)


def test_a_cache_is_saved_as_it_is_after_rows_were_selected_tokens_cropped_and_a_document_ended(
    focused, tokens, left_padding, fresh, read, assert_same, setup, tmp_path: Path
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(is_padded, 22))
    changed = [
        lambda: cache.reorder_cache(torch.tensor([1, 1, 0])),
        lambda: cache.truncate(20),
        cache.flush,
        lambda: cache.truncate(5),
        cache.reset,
    ]
    for change in changed:
        change()
        cache.save(tmp_path / "book", model)
        loaded, kept = FotCache.load(tmp_path / "book", model), copy.deepcopy(cache)
        assert loaded.get_seq_length() == kept.get_seq_length()
        question_BL = tokens(3, 6, seed=1)
        assert_same(read(model, loaded, question_BL), read(model, kept, question_BL), 0)


def test_an_empty_cache_is_saved_too(focused, tokens, read, assert_same, tmp_path: Path) -> None:
    model = focused()
    FotCache(model.config).save(tmp_path / "book", model)
    loaded = FotCache.load(tmp_path / "book", model)
    assert (loaded.get_seq_length(), loaded.rows) == (0, None)
    ids_BL = tokens(1, 19)
    assert_same(read(model, loaded, ids_BL), read(model, FotCache(model.config), ids_BL), 0)


def test_saving_changes_nothing_and_reading_on_changes_no_file(
    focused, tokens, fresh, goes_on, assert_same, tmp_path: Path
) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 22))
    cache.save(tmp_path / "book", model)
    before = (tmp_path / "book").read_bytes()
    loaded = FotCache.load(tmp_path / "book", model)
    answers = goes_on(model, cache)
    assert_same(answers, goes_on(model, fresh(model, tokens(2, 22))), 0)
    assert_same(goes_on(model, loaded), answers, 0)
    assert (tmp_path / "book").read_bytes() == before


def test_saving_again_replaces_the_file_at_once_also_for_who_reads_the_old_one(
    focused, tokens, fresh, tmp_path: Path
) -> None:
    model = focused()
    fresh(model, tokens(1, 30)).save(tmp_path / "book", model)
    before = (tmp_path / "book").read_bytes()
    with open(tmp_path / "book", "rb") as reader:
        fresh(model, tokens(1, 9)).save(tmp_path / "book", model)
        assert reader.read() == before
    assert FotCache.load(tmp_path / "book", model).get_seq_length() == 9
    assert [child.name for child in tmp_path.iterdir()] == ["book"]


@torch.enable_grad()
def test_a_cache_read_without_switching_gradients_off_is_saved_too(
    focused, tokens, fresh, goes_on, assert_same, tmp_path: Path
) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 22))
    cache.save(tmp_path / "book", model)
    assert_same(goes_on(model, FotCache.load(tmp_path / "book", model)), goes_on(model, cache), 0)


def test_how_much_is_read_at_once_does_not_tell_models_apart(focused) -> None:
    assert sampled_fingerprint(focused()) == sampled_fingerprint(focused(local_context=16, last_context_length=2))


def test_a_checkpoint_has_one_fingerprint_in_float32_and_in_bfloat16(focused, tmp_path: Path) -> None:
    model = focused()
    model.save_pretrained(tmp_path)
    rounded = FotLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert sampled_fingerprint(rounded) == sampled_fingerprint(model)


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("mem_dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("writes", "loads"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_what_a_model_saved_it_reads_on_in_another_number_type(
    focused,
    tokens,
    fresh,
    goes_on,
    writes: torch.dtype,
    loads: torch.dtype,
    mem_dtype: str | None,
    kept: int | None,
    tmp_path: Path,
) -> None:
    writer, loader = (
        focused(last_context_length=kept, mem_dtype=mem_dtype).bfloat16().to(it) for it in (writes, loads)
    )
    fresh(writer, tokens(2, 22)).save(tmp_path / "book", writer)
    loaded = FotCache.load(tmp_path / "book", loader)
    wanted = goes_on(loader, fresh(loader, tokens(2, 22)))
    for got, logits in zip(goes_on(loader, loaded), wanted, strict=True):
        assert got.dtype == loads
        assert (got - logits).float().norm() < 0.1 * logits.float().norm()
    assert {layer.keys.dtype for layer in loaded.layers} == {loads}


def test_a_file_of_a_longer_local_context_is_read_on_in_a_shorter_one(
    focused, tokens, fresh, goes_on, assert_same, tmp_path: Path
) -> None:
    longer, shorter = focused(local_context=16), focused(local_context=6)
    cache = fresh(longer, tokens(2, 16))
    cache.save(tmp_path / "book", longer)
    cache.evict(16 - 3)  # as much as makes room for half of the shorter one
    assert_same(goes_on(shorter, FotCache.load(tmp_path / "book", shorter)), goes_on(shorter, cache))


def test_a_file_says_what_it_is(focused, tokens, fresh, tmp_path: Path) -> None:
    model = focused()
    fresh(model, tokens(1, 22)).save(tmp_path / "book", model)
    with safe_open(tmp_path / "book", framework="pt") as file:
        said = file.metadata()
    assert said.pop("digest")
    assert said == {"format": "fot-cache-2", "model": sampled_fingerprint(model), "left": "16"}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_half_written(
    focused, tokens, fresh, tmp_path: Path
) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(1, 9)).save(path, model)
    before = path.read_bytes()
    longer = fresh(model, tokens(3, 400))
    with full_disk(20_000), pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        longer.save(path, model)
    assert [child.name for child in tmp_path.iterdir()] == ["book"]
    assert path.read_bytes() == before
    longer.save(path, model)
    assert FotCache.load(path, model).get_seq_length() == 400


def test_saving_into_a_directory_that_is_not_there_is_refused_and_makes_nothing(
    focused, tokens, fresh, tmp_path: Path
) -> None:
    model = focused()
    path = tmp_path / "nowhere" / "book"
    with pytest.raises((ValueError, OSError), match=re.escape(str(path.parent))):
        fresh(model, tokens(1, 9)).save(path, model)
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_directory_is_refused_and_leaves_it_as_it_was(focused, tokens, fresh, tmp_path: Path) -> None:
    model = focused()
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "page").touch()
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "book"))):
        fresh(model, tokens(1, 9)).save(tmp_path / "book", model)
    assert [child.name for child in tmp_path.rglob("*")] == ["book", "page"]
