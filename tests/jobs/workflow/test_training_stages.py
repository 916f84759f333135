"""A recipe's base that is no directory: brought once, beside its own tokenizer, and said where it came from."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from jobs.config.recipe import load_recipe
from jobs.config.train_spec import MODEL
from jobs.workflow.stages import recipe_stages
from jobs.workflow.training_stages import origin
from jobs.workflow.workspace import Workspace
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say
from pipelines.workflow.store import Output


@pytest.fixture
def built(local_ray, recipe: dict, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds the recipe's stages up to its base."""
    monkeypatch.chdir(tmp_path)
    recipe["evaluation"] = {}

    def build(*overrides: str) -> dict[str, Output]:
        workspace = Workspace(load_recipe(write_recipe(recipe), overrides))
        stages, outputs = recipe_stages(workspace), {}
        for stage in stages[: [stage.name for stage in stages].index("base") + 1]:
            outputs[stage.name] = workspace.store.build(stage, outputs, say)
        return outputs

    return build


def test_a_gguf_file_is_converted_once_and_its_tokenizer_is_the_datas(
    built, write_gguf, llama_for_gguf, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    outputs = built("base={checkpoint: tiny.gguf}")
    assert list(outputs)[:2] == ["checkpoint", "tokenizer"]
    base = outputs["base"].path / MODEL
    assert base.resolve() == outputs["checkpoint"].path / MODEL
    assert origin(base) == "tiny.gguf"
    model = LlamaForCausalLM.from_pretrained(base)
    assert model.lm_head.weight.equal(llama_for_gguf.lm_head.weight)
    text = "some words, 12  345"
    tokenizer = load_tokenizer(outputs["tokenizer"].path)
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(base).encode(text)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)

    again = built("base={checkpoint: tiny.gguf}")
    assert {name: output.key for name, output in again.items()} == {name: out.key for name, out in outputs.items()}
    assert all(output.reused for output in again.values())
    wider = built("base={checkpoint: tiny.gguf}", "finetune.objective.context=32")
    assert wider["checkpoint"].reused
    assert not wider["base"].reused

    own = built("base={checkpoint: tiny.gguf}", f"tokenizer.path={outputs['tokenizer'].path}")
    assert list(own).index("checkpoint") == len(own) - 2  # for the base alone
    assert own["checkpoint"].reused


def test_a_gguf_of_another_shape_than_the_recipes_is_refused_first(built, write_gguf, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    shape = "hidden_size: 64, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 300"
    with pytest.raises(UserError, match=r"tiny\.gguf has hidden_size 32, base\.shape says 64"):
        built(f"base={{checkpoint: tiny.gguf, shape: {{{shape}, max_position_embeddings: 64}}}}")


@pytest.mark.slow
def test_a_recipe_runs_on_a_gguf_file_to_its_end(fot_here, recipe: dict, write_recipe, write_gguf, tmp_path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    run = ["run", write_recipe(recipe), "--set", "base={checkpoint: tiny.gguf}", "--set", "tokenizer={}"]
    answer = fot_here(*run)
    assert answer.returncode == 0, answer.stdout
    again = fot_here(*run)
    for stage in ("checkpoint", "tokenizer", "base", "finetune"):
        assert f"{stage} found" in again.stdout
    assert fot_here("plan", *run[1:]).returncode == 0
    assert fot_here("data", "inspect", *run[1:]).returncode == 0
    model = next((tmp_path / "runs" / "store" / "finetune").glob("*/model"))
    task = ["--task", "passkey", "--set", "passkey={lengths: [4], trials: 2, digits: 2}", "--local", "32"]
    answer = fot_here("evaluate", model, *task, "--base", "tiny.gguf")
    assert answer.returncode == 0, answer.stdout
