"""The code in docs/model.md runs as it stands, on a LLaMA made on the spot."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.tokenizer import train_tokenizer

DOCS = Path(__file__).parents[1] / "docs"


def test_the_code_of_the_model_page_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    train_tokenizer(["Once upon a time there was a very long book. Who? Where?"], 280, Path("llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained("llama")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "model.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "model.md", "exec"), names)
    assert 0 <= names["mass"].r_d()[2] <= 1
    assert names["text"].shape[1] == names["book"].shape[1] + 20
    assert len(names["cache"].memory) > 0
    assert LlamaForCausalLM.from_pretrained("fot").config.num_hidden_layers == 3
