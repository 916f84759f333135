import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cluster.plan import base_shape
from jobs.config.recipe import load_recipe
from jobs.models.base import read_llama_config
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError

LONGLLAMA_3B = Path(__file__).parents[3] / "recipes" / "longllama_3b.yaml"
OPEN_LLAMA_3B = {  # as its config.json has it: nothing that transformers would add by itself
    "model_type": "llama",
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@pytest.fixture
def plan(start_fot):
    """Runs `fot plan`. Returns exit code and the lines printed."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        process = start_fot("plan", *arguments)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed.splitlines()

    return run


def checkpoint(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**OPEN_LLAMA_3B, **changes}))
    return directory


def test_the_plan_of_longllama_3b(plan) -> None:
    code, lines = plan(LONGLLAMA_3B)
    assert code == 0
    printed = dict(line.split(maxsplit=1) for line in lines[1:7])
    assert printed["parameters"] == "3,426,473,600 (3.43 B)"
    assert printed["tokens"] == "262,144 a step, 2.62 B in 10,000 steps"
    assert "d = 0, 2, 3, 3: 2 additional ones on average, in 3 of 26 layers" in printed["contexts"]
    assert printed["FLOPs"] == "5.62e+15 a step, 5.62e+19 in all"
    # 5.62e19 / (8 x 989e12 x 0.4) = 17.8k seconds
    assert printed["time"] == "4.93 hours, 39.5 device-hours, on 8 x H100 SXM (989 TFLOP/s, MFU 0.4)"
    assert "54.8 GB" in printed["host"]  # 8 workers load 6.85 GB each
    marked = [line.split() for line in lines if "*" in line]
    # 6.85 of weights, an eighth of as many gradients and of 16 bytes a parameter; 26 layer inputs; a layer
    assert marked == [["ZeRO", "2*", "6.9", "0.9", "6.9", "1.0", "3.1", "2.6", "21.3", "yes"]]


def test_the_plan_of_a_part_says_how_far_the_backward_pass_goes(plan) -> None:
    code, lines = plan(LONGLLAMA_3B, "--set", "finetune.train=memory_attention", "--set", "finetune.lora={rank: 16}")
    assert code == 0
    # 4 matrices of 3200 x 3200 in each of layers 6, 12, 18
    assert (
        "  trained      1,228,800 (1.23 M) by LoRA of rank 16 in 12 matrices; the backward pass goes through 20 of 26 "
        "layers" in lines
    )
    assert "  checkpoint   17.2 MB" in lines  # 14 bytes each
    code, lines = plan(LONGLLAMA_3B, "--set", "finetune.train={patterns: [qproj]}")
    assert code == 2
    assert any("finetune.train.patterns.0 'qproj' matches no parameter" in line for line in lines)


def test_the_page_on_plans_shows_what_is_printed(plan) -> None:
    page = (LONGLLAMA_3B.parents[1] / "docs" / "plan.md").read_text()
    shown = page.split("$ fot plan recipes/longllama_3b.yaml\n")[1].split("```")[0]
    assert plan(LONGLLAMA_3B)[1] == shown.splitlines()
    for name in ("longllama_7b", "llama31_8b", "code_llama_7b"):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        lines = plan(LONGLLAMA_3B.with_stem(name))[1]
        total = next(line.split()[-2] for line in lines if "*" in line)
        hours = next(line.split()[3] for line in lines if line.startswith("  time"))
        assert [cell.strip() for cell in row.split("|")][-3:-1] == [total, hours]


def test_the_plan_answers_in_under_two_seconds_without_torch_and_ray(plan) -> None:
    plan(LONGLLAMA_3B)  # the first start compiles byte code
    began = time.monotonic()
    assert plan(LONGLLAMA_3B)[0] == 0
    assert time.monotonic() - began < 2.0
    code = f"""
import sys
from pathlib import Path
from jobs.cluster.plan import show_plan
show_plan(Path({str(LONGLLAMA_3B)!r}), [], "H100", 0.4)
sys.exit(bool({{"torch", "ray", "transformers", "deepspeed"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_plan_follows_settings_device_and_mfu(plan) -> None:
    def hours(*arguments: str) -> float:
        line = next(line for line in plan(LONGLLAMA_3B, *arguments)[1] if line.startswith("  time"))
        return float(line.split()[1])

    assert hours("--mfu", "0.2") == pytest.approx(2 * hours(), rel=0.01)
    assert hours("--device", "A100 40GB") == pytest.approx(hours() * 989 / 312, rel=0.01)
    assert hours("--set", "finetune.steps=20000") == pytest.approx(2 * hours(), rel=0.01)

    def fits(*arguments: str) -> list[str]:
        return [line.split()[-1] for line in plan(LONGLLAMA_3B, *arguments)[1] if "ZeRO" in line][1:]

    assert fits() == ["no", "yes", "yes", "yes"]
    assert fits("--device", "4090") == ["no", "no", "yes", "yes"]
    assert fits("--set", "finetune.deepspeed.activation_checkpointing=false") == ["no", "no", "no", "no"]


def test_every_training_of_a_recipe_is_planned(plan, recipe: dict, write_recipe) -> None:
    code, lines = plan(write_recipe(recipe))
    assert code == 0
    heads = [line for line in lines if line.startswith("tiny")]
    assert heads == ["tiny, base: 2 CPU workers, ZeRO 2, float32", "tiny, finetune: 2 CPU workers, ZeRO 2, float32"]
    # 300 x 32 embedding, tied; 2 layers of 4 x 32 x 32 + 3 x 32 x 48 and two norms; a norm
    assert lines[1].split()[1] == f"{300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 64) + 32:,}"


@pytest.mark.parametrize(
    ("objective", "printed"),
    [
        ({"kind": "standard"}, "each sees itself"),
        ({"kind": "transformer_xl"}, "d = 0 or 1: 0.75 additional ones on average, in 26 of 26 layers"),
        ({"kind": "memorizing"}, "d = 0, 1, 2, 3: 1.5 additional ones on average, in 3 of 26 layers"),
        ({"kind": "fot", "d": 2}, "d = 2: 1.5 additional ones on average, in 3 of 26 layers"),
        ({"kind": "fot", "d": {"of": [1, 2]}}, "d = 1 or 2: 1.12 additional"),
        ({"kind": "fot", "d": {"first": 1, "until": 5000, "then": 2}}, "d = 1, from step 5000 on 2: 1.12 additional"),
    ],
)
def test_every_objective_can_be_planned(plan, objective: dict, printed: str) -> None:
    code, lines = plan(LONGLLAMA_3B, "--set", f"finetune.objective={json.dumps({'context': 2048, **objective})}")
    assert code == 0, lines
    assert printed in lines[3]


def test_a_checkpoint_that_is_here_tells_its_shape_with_or_without_weights(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", num_hidden_layers=20)
    recipe = load_recipe(LONGLLAMA_3B, [f"base.checkpoint={model}", "base.shape=null"])
    assert base_shape(recipe).num_hidden_layers == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 4096}, "has hidden_size 4096, base.shape says 3200"),
        ({"num_key_value_heads": 8}, "has num_key_value_heads 8, base.shape says 32"),
        ({"head_dim": 128}, "has head_dim 128, base.shape says 100"),
        ({"rope_theta": 1e6}, "has rope_theta 1000000.0, base.shape says 10000.0"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "has rope_theta 500000.0, base.shape says 10000.0"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings True, base.shape says False"),
        ({"max_position_embeddings": 4096}, "has max_position_embeddings 4096, base.shape says 2048"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    model = checkpoint(tmp_path / "model", **changes)
    (model / "model.safetensors").touch()
    recipe = load_recipe(LONGLLAMA_3B, [f"base.checkpoint={model}"])
    for read in (lambda: read_llama_config(model, recipe.base.shape), lambda: base_shape(recipe)):
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_the_checkpoint_that_the_recipe_is_for_is_taken(tmp_path: Path) -> None:
    said = {"num_key_value_heads": 32, "head_dim": 100, "rope_parameters": {"rope_theta": 10000.0}}
    for changes in ({}, said, {"rope_theta": 10000}):
        model = checkpoint(tmp_path / "model", **changes)
        (model / "model.safetensors").touch()
        recipe = load_recipe(LONGLLAMA_3B, [f"base.checkpoint={model}"])
        assert read_llama_config(model, recipe.base.shape)["hidden_size"] == 3200
        assert base_shape(recipe) == base_shape(load_recipe(LONGLLAMA_3B))


def test_a_base_that_is_made_here_has_its_tokenizers_vocabulary(recipe: dict, write_recipe, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(["the words of some text and more of them"] * 5, 270, tmp_path / "tokenizer")
    path = write_recipe(recipe)
    assert base_shape(load_recipe(path)).vocab_size == 300
    assert 256 < base_shape(load_recipe(path, [f"tokenizer.path={tmp_path}/tokenizer"])).vocab_size <= 270


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "Abacus"], "--device Abacus: its peak is not known here; give one of B200, H200 NVL"),
        (["--set", "base.shape=null"], "has no config.json, so its shape is unknown"),
        (
            ["--set", "base.shape.hiden_size=3"],
            "unknown key base.shape.hiden_size: did you mean base.shape.hidden_size?",
        ),
        (["--set", "base.shape.vocab_size=0"], "base.shape.vocab_size = 0"),
        (["--set", "base.checkpoint=null"], "base: give either a Hugging Face LLaMA directory"),
        (["--set", "finetune.objective.mem_layers=[26]"], "mem_layers [26]: the base has 26 layers, 0 to 25"),
        (["--set", "finetune.objective.mem_layers={auto: 27}"], "mem_layers {auto: 27}: the base has 26 layers"),
        (["--set", "finetune.objective.mem_layers=most"], "mem_layers 'most': give layer numbers, such as [8, 15]"),
        (["--set", "finetune.objective.context=4096"], "(4096) is longer than the base is made for (2048)"),
        (["--set", "resources.workers=3"], "is not a multiple of resources.workers (3)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(plan, arguments: list[str], message: str) -> None:
    code, lines = plan(LONGLLAMA_3B, *arguments)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("fot: ")
    assert message in lines[0]


def test_a_tokenizer_that_is_not_here_is_one_line(plan, recipe: dict, write_recipe) -> None:
    code, lines = plan(write_recipe(recipe), "--set", "tokenizer.path=org/nowhere")
    assert (code, len(lines)) == (2, 1)
    assert "so the vocabulary is unknown" in lines[0]


def test_a_shape_beside_pretraining_is_refused(recipe: dict, write_recipe) -> None:
    shape = {name: value for name, value in OPEN_LLAMA_3B.items() if name != "model_type"}
    recipe["base"]["shape"] = shape
    with pytest.raises(UserError, match=r"base\.shape is a checkpoint's: with base\.pretrain leave it out"):
        load_recipe(write_recipe(recipe))


def test_the_shape_of_a_gguf_file_is_its_headers(recipe: dict, write_recipe, write_gguf, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    path = write_recipe(recipe)
    shape = base_shape(load_recipe(path, [f"base={{checkpoint: {tmp_path}/tiny.gguf}}"]))
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads, shape.vocab_size) == (2, 32, 2, 300)
    with pytest.raises(UserError, match=r"no package no_such_package in this environment"):
        base_shape(load_recipe(path, ["base={checkpoint: 'package:no_such_package/x.gguf'}"]))
