"""A checkpoint is looked at whole: what cannot be used is one line that names it, before anything is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.config.recipe import load_recipe
from jobs.models.base import check_tokens, check_vocabulary, load_llama, look_at_checkpoint
from jobs.workflow.stages import recipe_stages
from jobs.workflow.workspace import Workspace
from pipelines.tokens.tokenizer import TRAINED_HERE, read_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=16, **SHAPE)).save_pretrained(path)
    train_tokenizer(["some words, and others"] * 9, 300, path)
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", **changes)


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content)


def lose_a_tensor(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors")


FP8, BITS = {"quant_method": "fp8"}, {"bits": 4}
SPIRAL, OLDER = {"rope_type": "spiral", "rope_theta": 1e4}, {"type": "spiral", "factor": 2.0}
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantized": (config(quantization_config=FP8), r"is quantized \(fp8\): give the model's weights as they were"),
    "quantized by nobody": (config(quantization_config=BITS), r"is quantized \(quantization_config\)"),
    "vocabulary": (config(vocab_size=320), r"holds lm_head\.weight of \[300, 32\], by .* is \[320, 32\]"),
    "a tensor lost": (lose_a_tensor, r"lacks model\.norm\.weight: download"),
    "a layer more": (config(num_hidden_layers=1), r"holds model\.layers\.1\.input_layernorm\.weight, .* and 7 more"),
    "rope": (config(rope_parameters=SPIRAL), "its RoPE is of an unknown kind, 'spiral'"),
    "older rope": (config(rope_parameters=None, rope_scaling=OLDER), "unknown kind, 'spiral'"),
    "activation": (config(hidden_act="swirl"), r"no model can be made of its config.json \(KeyError"),
    "heads": (config(num_attention_heads=0, head_dim=None), "no model can be made of its config.json"),
    "memory layers": (config(model_type="fot_llama", mem_layers=[7]), r"no model can .*mem_layers \[7\] out of"),
    "an adapter beside": (write("adapter_config.json", "{}"), r"holds a PEFT adapter \(adapter_config.json\)"),
    "generation": (write("generation_config.json", "{"), "its generation_config.json is not JSON"),
    "a pointer": (write("model.safetensors", LFS), r"model\.safetensors is a git-lfs pointer"),
    "another pointer": (write("config.json", LFS), r"config\.json is a git-lfs pointer"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_used_is_one_line(llama: Path, change: Callable[[Path], object], said: str) -> None:
    assert look_at_checkpoint(llama)["vocab_size"] == 300
    change(llama)
    with pytest.raises(UserError, match=said) as caught:
        look_at_checkpoint(llama)
    assert "\n" not in str(caught.value)
    assert str(llama) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_every_llama_that_loads_is_let_through(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = LlamaConfig(vocab_size=300, max_position_embeddings=16, **SHAPE, **settings)
    LlamaForCausalLM(made).save_pretrained(tmp_path / "a", max_shard_size="40KB")
    look_at_checkpoint(tmp_path / "a")
    FotLlamaForCausalLM.from_pretrained(tmp_path / "a", mem_layers=[1], mem_gate=True).save_pretrained(tmp_path / "b")
    look_at_checkpoint(tmp_path / "b")


def test_what_does_not_load_is_a_users_error(llama: Path) -> None:
    assert load_llama(llama, mem_layers=[1]).config.mem_layers == [1]
    lose_a_tensor(llama)
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        load_llama(llama)


def test_more_tokens_than_embeddings_are_borne_where_no_document_can_hold_them(llama: Path) -> None:
    edit(llama / "tokenizer_config.json", pad_token="[PAD]")
    tokenizer = read_tokenizer(str(llama))
    beyond = tokenizer.vocab_size
    edit(llama / "config.json", vocab_size=beyond - 1)
    assert tokenizer.tokenizer.id_to_token(beyond - 1) == "[PAD]"
    check_vocabulary(llama, tokenizer)
    check_tokens(llama, tokenizer)
    edit(llama / "config.json", vocab_size=beyond - 2)
    with pytest.raises(UserError, match=rf"has {beyond - 1} tokens, the model in {llama} only {beyond - 2}: .*take '"):
        check_vocabulary(llama, tokenizer)
    edit(llama / "config.json", vocab_size=beyond - 1)
    edit(llama / "tokenizer_config.json", eos_token="[PAD]")  # which every document ends with
    with pytest.raises(UserError, match=rf"has {beyond} tokens, .* take '\[PAD\]'"):
        check_vocabulary(llama, read_tokenizer(str(llama)))


def test_a_token_that_a_text_may_become_needs_its_embedding(llama: Path) -> None:
    definition = json.loads((llama / "tokenizer.json").read_text())
    number = len(definition["model"]["vocab"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"].append({"id": number, "content": "[word]", "special": False, **token})
    (llama / "tokenizer.json").write_text(json.dumps(definition))
    edit(llama / "config.json", vocab_size=number)
    tokenizer = read_tokenizer(str(llama))
    assert number in tokenizer.encode("a [word]")
    with pytest.raises(UserError, match=rf"has {number + 1} tokens, .* take '\[word\]'"):
        check_vocabulary(llama, tokenizer)


@pytest.fixture
def stages(recipe: dict, write_recipe, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe["base"], recipe["tokenizer"], recipe["evaluation"] = {"checkpoint": str(llama)}, {}, {}
    return lambda: recipe_stages(Workspace(load_recipe(write_recipe(recipe), [])))


def test_a_base_that_is_given_comes_before_anything_is_tokenized(stages, recipe: dict) -> None:
    names = [stage.name for stage in stages()]
    assert names[:4] == ["tokenizer", "base", "shards", "index"]
    standard = {**recipe["finetune"], "objective": {"kind": "standard", "context": 16}}
    recipe["base"] = {"pretrain": {"shape": SHAPE, "training": standard}}
    names = [stage.name for stage in stages()]
    assert names[:3] == ["tokenizer", "shards", "index"]
    assert names.index("base") < names.index("finetune")


def test_a_recipe_with_a_checkpoint_that_cannot_be_used_has_no_stages(stages, llama: Path) -> None:
    lose_a_tensor(llama)
    with pytest.raises(UserError, match=r"^base\.checkpoint .*llama lacks model\.norm\.weight"):
        stages()


def test_a_changed_chat_template_is_another_tokenizer(stages, llama: Path) -> None:
    assert json.loads((llama / "tokenizer_config.json").read_text()) == TRAINED_HERE
    made = stages()[0]
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert stages()[0].params != made.params
