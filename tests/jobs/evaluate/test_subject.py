import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fot_model import FotCache, FotLlamaForCausalLM, TopKMemory
from jobs.config.evaluation import MemorySettings
from jobs.evaluate import subject as module
from jobs.evaluate.subject import (
    check_models,
    check_tokenizer,
    load_model,
    memory_bytes,
    new_cache,
    open_documents,
    read_into,
    read_tokenizer,
    weights_bytes,
)
from pipelines.tokens.tokenizer import load_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError

LOCAL = 16  # as the model of the fixtures


def test_the_base_reads_with_the_models_memory_layers(save_model) -> None:
    model = save_model(num_hidden_layers=3, mem_layers=[1, 2])
    base = save_model(num_hidden_layers=3, mem_layers=[], mem_positionals=True)
    assert load_model(base, model).config.mem_layers == [1, 2]
    assert not load_model(base, model).config.mem_positionals
    assert load_model(base, base).config.mem_layers == []
    assert not load_model(base, base).training


def test_the_base_reads_with_the_local_context_and_the_number_type_of_memory_of_the_model(save_model) -> None:
    model = save_model(mem_dtype="bfloat16")
    base = save_model(local_context=LOCAL // 2, mem_dtype="float16")
    loaded = load_model(base, model)
    assert loaded.config.window == LOCAL
    assert new_cache(loaded, MemorySettings()).memory.dtype == torch.bfloat16
    read_into(loaded, new_cache(loaded, MemorySettings()), torch.ones(1, LOCAL, dtype=torch.long), LOCAL)


def test_the_base_of_a_model_that_knows_of_no_memory_has_none_either(save_model) -> None:
    model, base = save_model(), save_model()
    config = json.loads((model / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("mem_")}
    (model / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    assert load_model(base, model).config.mem_layers == []


def test_a_worker_never_holds_two_models(save_model, monkeypatch) -> None:
    one, other = save_model(), save_model()
    first = weakref.ref(load_model(one, one))
    assert load_model(one, one) is first()
    load = module._load

    def noted(*paths: Path) -> FotLlamaForCausalLM:
        gc.collect()
        assert first() is None
        return load(*paths)

    monkeypatch.setattr(module, "_load", noted)
    assert load_model(other, other) is load_model(other, other)


def test_a_local_context_or_layers_that_a_model_lacks_are_a_users_error(save_model, model_dir: Path) -> None:
    short, flat = save_model(max_position_embeddings=LOCAL // 2), save_model(num_hidden_layers=1)
    deep = save_model(num_hidden_layers=3, mem_layers=[2])
    check_models({"model": model_dir, "base": save_model(local_context=LOCAL // 2)}, LOCAL)
    with pytest.raises(UserError, match=f"{model_dir}: its local context holds up to 16 tokens, not 17: lower --local"):
        check_models({"model": model_dir}, LOCAL + 1)
    with pytest.raises(UserError, match=f"{short}: its local context holds up to 8 tokens, not 16"):
        check_models({"model": model_dir, "base": short}, LOCAL)
    with pytest.raises(UserError, match=rf"{flat}: it has 1 layers, the memory layers of {deep} are \[2\]"):
        check_models({"model": deep, "base": flat}, LOCAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_in_its_own_number_type(save_model, dtype: torch.dtype) -> None:
    directory = save_model()
    FotLlamaForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    module._loaded.clear()
    assert load_model(directory, directory).dtype == dtype


def test_a_model_is_loaded_and_its_room_estimated_in_another_number_type(model_dir: Path) -> None:
    assert load_model(model_dir, model_dir).dtype == torch.float32
    assert load_model(model_dir, model_dir, "bfloat16").dtype == torch.bfloat16
    assert weights_bytes(model_dir, "bfloat16") == weights_bytes(model_dir) // 2
    assert weights_bytes(model_dir, "float32") == weights_bytes(model_dir)
    room = memory_bytes(model_dir, MemorySettings(), 100, LOCAL)
    assert memory_bytes(model_dir, MemorySettings(), 100, LOCAL, dtype="bfloat16") == room // 2
    assert memory_bytes(model_dir, MemorySettings(dtype="float32"), 100, LOCAL, dtype="bfloat16") == room


def test_reading_window_by_window_is_reading_at_once(model_dir: Path) -> None:
    model = load_model(model_dir, model_dir)
    ids_BT = torch.randint(2, 280, (2, 3 * LOCAL), generator=torch.Generator().manual_seed(0))
    made = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: made.append(inputs[0].shape[1]))
    with torch.inference_mode():
        windows, whole = FotCache(model.config), FotCache(model.config)
        read_into(model, windows, ids_BT, LOCAL)
        assert made == [1, 1, 1], "no logits but the last of a window"
        model(ids_BT, past_key_values=whole, last_context_length=LOCAL)
        whole.flush()
    hook.remove()
    assert windows.local_length == 0
    for name, tensor in whole.memory.state_dict().items():
        torch.testing.assert_close(windows.memory.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("windows", [1, 3, 8, 9])
def test_the_estimate_of_memory_is_what_buffers_hold_at_most(model_dir: Path, dtype: str | None, windows: int) -> None:
    memory, model = MemorySettings(dtype=dtype), load_model(model_dir, model_dir)
    cache, rows = new_cache(model, memory), 2
    ids_BT = torch.randint(2, 280, (rows, windows * LOCAL))
    with torch.inference_mode():
        read_into(model, cache, ids_BT, LOCAL)
    held = sum(each._held.nbytes for layer in cache.memory._layers.values() for each in layer.buffers().values())
    estimate = memory_bytes(model_dir, memory, windows * LOCAL, LOCAL, rows)
    assert estimate == held + held / 2 / 2, "and half of the keys or of the values, while they are copied"


def test_a_model_without_memory_layers_or_with_nothing_to_remember_holds_nothing(save_model, model_dir: Path) -> None:
    assert memory_bytes(save_model(mem_layers=[]), MemorySettings(), 100, LOCAL) == 0
    assert memory_bytes(model_dir, MemorySettings(), 0, LOCAL) == 0


def test_memory_attends_as_asked_for(model_dir: Path) -> None:
    model = load_model(model_dir, model_dir)
    few = new_cache(model, MemorySettings(top_k=7, dtype="bfloat16")).memory
    assert isinstance(few, TopKMemory)
    assert (few.k, few.dtype) == (7, torch.bfloat16)
    assert not isinstance(new_cache(model, MemorySettings()).memory, TopKMemory)


def test_weights_are_counted_by_their_files(model_dir: Path) -> None:
    parameters = sum(each.numel() for each in load_model(model_dir, model_dir).parameters())
    assert weights_bytes(model_dir) == pytest.approx(4 * parameters, rel=0.2)


def test_the_tokenizer_lies_beside_the_model(model_dir: Path, tmp_path: Path) -> None:
    text = "the grass is green 123 déjà"
    assert read_tokenizer(model_dir).encode(text) == load_tokenizer(model_dir).encode(text)
    with pytest.raises(UserError, match="no tokenizer in"):
        read_tokenizer(tmp_path)


def test_documents_of_another_tokenizer_are_a_users_error(subject_of, save_model) -> None:
    subject = subject_of({"s": [40]})
    check_tokenizer(subject, open_documents(subject))
    other = save_model()
    train_tokenizer(["quite other words in here"], 270, other)
    with pytest.raises(UserError, match=f"were tokenized otherwise than the model {other} does: tokenize them"):
        check_tokenizer(replace(subject, models={"model": other}), open_documents(subject))
    both = {"model": subject.model, "base": other}
    with pytest.raises(UserError, match=f"were tokenized otherwise than the base {other} does: leave it out"):
        check_tokenizer(replace(subject, models=both), open_documents(subject))
