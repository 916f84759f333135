import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from jobs.config.evaluation import RIVALS, MemorySettings
from jobs.evaluate.full_attention import FullReader, read_on
from jobs.evaluate.readers import ChainReader, MemoryReader, check_reading, held_bytes, open_reader, rows_together
from jobs.evaluate.retrieval import RetrievalReader
from jobs.evaluate.subject import Reading, Subject, load_model
from pipelines.workflow.errors import UserError

LOCAL = 16  # as the model of the fixtures


def reading(model: Path, kind: str, **more: int) -> Subject:
    return Subject({"model": model, "base": model}, LOCAL, seed=0, reading=Reading(kind, **more))


def test_every_kind_has_its_reader_and_the_base_reads_with_memory(save_model, model_dir: Path) -> None:
    kinds = {"memory": MemoryReader, "full": FullReader, "yarn": FullReader, "dynamic_ntk": FullReader}
    assert set(RIVALS) == {*kinds, "bm25"} - {"memory"}
    for kind, reader in {**kinds, "bm25": RetrievalReader}.items():
        subject = reading(model_dir, kind, longest=64)
        assert type(open_reader(subject, "model")) is reader
        assert type(open_reader(subject, "base")) is MemoryReader
    chained = save_model(mem_layers=[], previous_context=True)
    assert type(open_reader(reading(chained, "memory"), "model")) is ChainReader


@pytest.mark.parametrize("kind", ["memory", "full", "yarn", "dynamic_ntk", "bm25"])
def test_all_answer_alike_where_everything_fits_the_local_context(save_model, kind: str) -> None:
    model = save_model(mem_positionals=True, num_hidden_layers=2, mem_layers=[1])
    ids = torch.randint(2, 280, (2, LOCAL + 1), generator=torch.Generator().manual_seed(0))
    plain, subject = load_model(model, model), reading(model, kind, longest=LOCAL)
    with torch.inference_mode():
        logits = plain(ids, use_cache=False).logits
        wanted = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))
        reader = open_reader(subject, "model")
        assert reader.losses(ids, 1)[:, 0].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
        ask = reader.ask(ids[:, : LOCAL - 4], 3, 4)
        for _ in range(2):
            torch.testing.assert_close(
                ask(ids[:, LOCAL - 4 : LOCAL]), logits[:, LOCAL - 5 : LOCAL], rtol=1e-4, atol=1e-4
            )


def test_what_full_attention_holds_is_estimated_by_its_cache(model_dir: Path) -> None:
    model, tokens = load_model(model_dir, model_dir), 200
    cache = DynamicCache()
    with torch.inference_mode():
        read_on(model, torch.ones(2, tokens, dtype=torch.long), cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    estimate = held_bytes(reading(model_dir, "full"), "model", tokens, 2)
    assert held <= estimate < held + 2 * tokens * 16 * 8 * 4 + 5 * 2 * tokens * tokens + 2 * held
    assert held_bytes(reading(model_dir, "bm25"), "model", 10**6, 1) == held_bytes(
        reading(model_dir, "bm25"), "model", LOCAL, 1
    )


def test_long_texts_are_read_one_by_one_in_full_attention(model_dir: Path) -> None:
    full, memory = reading(model_dir, "full"), reading(model_dir, "memory")
    assert [rows_together(full, "model", tokens, 8) for tokens in (512, 2048, 10**5)] == [8, 4, 1]
    assert rows_together(full, "base", 10**5, 8) == rows_together(memory, "model", 10**5, 8) == 8


def test_what_cannot_be_read_otherwise_is_a_users_error(save_model) -> None:
    model = save_model(mem_layers=[], previous_context=True)
    with pytest.raises(UserError, match="is a Transformer-XL: it is read as it was trained"):
        check_reading(reading(model, "full"))
    scaled = save_model()
    config = json.loads((scaled / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(config))
    for kind in ("yarn", "dynamic_ntk"):
        with pytest.raises(UserError, match=rf"its RoPE is scaled already \(linear\).* leave the rival {kind} out"):
            check_reading(reading(scaled, kind))
    check_reading(reading(scaled, "full"))
    check_reading(replace(reading(scaled, "memory"), memory=MemorySettings(top_k=2)))
