"""The dictionary evaluation against one made by hand, on tiny models.

Shapes: L tokens, M tokens in memory.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fot_model import FotCache, FotLlamaForCausalLM, TopKMemory
from jobs.config.dictionary import DictionaryEvaluation, DictionaryRecipe, DictionaryShape
from jobs.evaluate.dictionary import accuracy as module
from jobs.evaluate.dictionary.accuracy import DictionaryReader, accuracy, batches, summarize
from jobs.evaluate.dictionary.result import PLOT, dictionary_result
from jobs.evaluate.dictionary.task import IGNORE, Dictionary, answers, contexts
from jobs.evaluate.dictionary.train import build_model
from pipelines.workflow.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
SHAPES = {
    "last": DictionaryShape(**SIZES),
    "not last": DictionaryShape(**SIZES, num_hidden_layers=3, mem_layers=(1,)),
    "several": DictionaryShape(**SIZES, num_hidden_layers=3, mem_layers=(1, 2)),
    "shared keys": DictionaryShape(**SIZES, num_key_value_heads=1),
}
SETTINGS = DictionaryEvaluation(tokens=(256, 1024), windows=5, batch=3, top_k=7, dtype="float32")


def saved(shape: DictionaryShape, directory: Path) -> FotLlamaForCausalLM:
    """A model whose attention decides on its answers, as a trained one's does."""
    model = build_model(shape, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def by_hand(model: FotLlamaForCausalLM, seed: int, tokens: int, top_k: int | None) -> tuple[list[Tensor], int]:
    """Logits of every context of questions, each asked alone of a memory that read context by context; and how many
    value tokens are right."""
    dictionary, cache = Dictionary(SETTINGS.seed + seed), FotCache(model.config)
    for row in contexts(dictionary.records(np.arange(tokens // 256 * 25)), 25):
        model(torch.from_numpy(row)[None], past_key_values=cache)
        cache.flush()
    assert len(cache.memory) == tokens
    if top_k is not None:
        searched = TopKMemory(top_k)
        searched.load_state_dict(cache.memory.state_dict())
        cache.memory = searched
    all_logits, right = [], 0
    for questions in batches(dictionary, tokens, SETTINGS, seed):
        for row in questions:
            logits = model(torch.from_numpy(row)[None], past_key_values=cache).logits[0, :-1]
            cache.truncate(tokens)
            wanted = torch.from_numpy(answers(row[None])[0, 1:])
            scored = wanted != IGNORE
            right += int((logits.argmax(-1)[scored] == wanted[scored]).sum())
            all_logits.append(logits[scored])
    return all_logits, right


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_one_made_by_hand(shape: str, tmp_path: Path, monkeypatch) -> None:
    model = saved(SHAPES[shape], tmp_path / "model")
    logits: list[Tensor] = []
    forward = FotLlamaForCausalLM.forward

    def listening(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if isinstance(kwargs["past_key_values"].memory, module.Asked):
            scored = (answers(args[0].numpy()) != IGNORE)[:, 1:]
            logits.extend(
                row[torch.from_numpy(mask)].clone() for row, mask in zip(output.logits[:, :-1], scored, strict=True)
            )
        return output

    monkeypatch.setattr(FotLlamaForCausalLM, "forward", listening)
    found = accuracy(tmp_path / "model", SETTINGS, 4, tmp_path)
    monkeypatch.undo()
    expected = [by_hand(model, 4, tokens, top_k) for tokens in (256, 1024) for top_k in (None, 7)]
    wanted = [row for rows, _ in expected for row in rows]
    assert len(logits) == len(wanted) == 20
    for ours, theirs in zip(logits, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    counted = [found[way][size] for size in ("256", "1024") for way in ("dense", "top_k")]
    assert counted == [{"correct": right, "questions": 500} for _, right in expected]


@torch.no_grad()
def test_with_one_memory_layer_what_is_remembered_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = saved(SHAPES["not last"], tmp_path)
    dictionary = Dictionary(9)
    held = []
    for batch in (1, 3, 8):
        reader = DictionaryReader(model, dictionary, SETTINGS.model_copy(update={"batch": batch}))
        assert list(reader.grow(2048))[-1] == 2048
        held.append(reader.memory.state_dict())
    in_order = FotCache(model.config)
    for row in contexts(dictionary.records(np.arange(200)), 25):
        model(torch.from_numpy(row)[None], past_key_values=in_order)
        in_order.flush()
    for state in held:
        assert state.keys() == in_order.memory.state_dict().keys()
        for name, tensor in in_order.memory.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_memory_is_held_as_the_settings_say(tmp_path: Path) -> None:
    model = saved(SHAPES["last"], tmp_path)
    for dtype in ("float32", "bfloat16"):
        reader = DictionaryReader(model, Dictionary(0), DictionaryEvaluation(dtype=dtype))
        with torch.inference_mode():
            list(reader.grow(512))
        assert {str(tensor.dtype) for tensor in reader.memory.state_dict().values()} == {f"torch.{dtype}"}


def test_questions_are_of_what_is_held_and_differ_by_seed_and_size() -> None:
    dictionary = Dictionary(SETTINGS.seed)
    drawn = {}
    for seed, tokens in ((0, 256), (0, 1024), (1, 1024)):
        rows = np.concatenate(list(batches(dictionary, tokens, SETTINGS, seed)))
        assert rows.shape == (5, 256)
        held = {tuple(record[1:]) for record in dictionary.records(np.arange(tokens // 256 * 25)).tolist()}
        for row in rows:
            asked = [tuple(question[1:]) for question in row[:250].reshape(25, 10).tolist()]
            assert set(asked) <= held
            assert len(set(asked)) == 25
        drawn[seed, tokens] = rows.tolist()
    assert drawn[0, 1024] != drawn[1, 1024] != drawn[0, 256]


def test_what_was_asked_is_not_asked_again(tmp_path: Path, monkeypatch) -> None:
    saved(SHAPES["last"], tmp_path / "model")
    asked: list[tuple[int, str]] = []
    ask = module.ask

    def counting(model, memory, way, questions):
        if len(memory) == 1024 and "stop" in asked:
            raise KeyboardInterrupt
        asked.append((len(memory), way))
        return ask(model, memory, way, questions)

    monkeypatch.setattr(module, "ask", counting)
    asked.append("stop")
    with pytest.raises(KeyboardInterrupt):
        accuracy(tmp_path / "model", SETTINGS, 0, tmp_path)
    kept = json.loads((tmp_path / "accuracy.json").read_text())["accuracy"]
    assert {way: list(sizes) for way, sizes in kept.items()} == {"dense": ["256"], "top_k": ["256"]}
    asked.clear()
    resumed = accuracy(tmp_path / "model", SETTINGS, 0, tmp_path)
    assert {size for size, _ in asked} == {1024}
    asked.clear()
    assert accuracy(tmp_path / "model", SETTINGS, 0, tmp_path) == resumed
    assert asked == []
    assert accuracy(tmp_path / "model", SETTINGS, 0, tmp_path / "fresh") == resumed
    asked.clear()
    accuracy(tmp_path / "model", SETTINGS, 1, tmp_path)
    assert {size for size, _ in asked} == {256, 1024}, "another seed's results are not these"


def test_dense_alone(tmp_path: Path) -> None:
    saved(SHAPES["last"], tmp_path / "model")
    found = accuracy(tmp_path / "model", SETTINGS.model_copy(update={"top_k": None, "tokens": (256,)}), 0, tmp_path)
    assert list(found) == ["dense"]


def test_a_memory_that_is_too_large_is_refused_with_what_fits(tmp_path: Path) -> None:
    saved(SHAPES["last"], tmp_path / "model")
    settings = DictionaryEvaluation(
        tokens=(2**24,), max_gigabytes=1.0
    )  # 2 x 2 heads of 16 in bfloat16: 128 bytes a token
    with pytest.raises(UserError, match=r"16777216 tokens take 2\.0 GiB in bfloat16.*is 1: 8388608 tokens fit"):
        accuracy(tmp_path / "model", settings, 0, tmp_path)


def test_table_metrics_and_plot(tmp_path: Path) -> None:
    by_seed = {
        seed: {
            "dense": {"256": {"correct": 100, "questions": 100}, "512": {"correct": right, "questions": 100}},
            "top_k": {"256": {"correct": 98, "questions": 100}, "512": {"correct": right + 1, "questions": 100}},
        }
        for seed, right in ((0, 90), (1, 70), (2, 95))
    }
    rows, metrics = summarize(by_seed, 32)
    assert [(row.way, row.tokens, row.median, row.by_seed, row.trials) for row in rows] == [
        ("dense", 256, 1.0, (1.0, 1.0, 1.0), 100),
        ("dense", 512, 0.9, (0.9, 0.7, 0.95), 100),
        ("top-k (k = 32)", 256, 0.98, (0.98, 0.98, 0.98), 100),
        ("top-k (k = 32)", 512, 0.91, (0.91, 0.71, 0.96), 100),
    ]
    assert metrics == [
        ("dictionary/dense", 1.0, 256),
        ("dictionary/dense", 0.9, 512),
        ("dictionary/top_k", 0.98, 256),
        ("dictionary/top_k", 0.91, 512),
    ]
    result = dictionary_result(by_seed, SETTINGS, {0: 6.5}, tmp_path)
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    assert [row[2] for row in result.tables[0].rows] == [row.median for row in rows]
    assert "6.5 (seed 0)" in result.tables[0].note


def test_the_recipe_of_the_tests_is_a_recipe(make_recipe) -> None:
    assert isinstance(make_recipe(), DictionaryRecipe)
