"""A user's mistakes about a training: one line, exit code 2, before any step."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from pipelines.tokens.tokenizer import train_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def own(recipe: dict, write_recipe, corpus: Path, tmp_path: Path):
    """The tiny recipe on a checkpoint of its own; returns (recipe file, checkpoint)."""
    model = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=16, **SHAPE)).save_pretrained(model)
    train_tokenizer([corpus.read_text()], 300, model)
    recipe["base"] = {"checkpoint": str(model)}
    return write_recipe(recipe), model


def refused(answer, *words: str) -> None:
    assert answer.returncode == 2, answer.stdout
    last = answer.stdout.splitlines()[-1]
    assert last.startswith("fot: ")
    for word in words:
        assert word in last
    assert "Traceback" not in answer.stdout


def test_a_base_that_cannot_be_fine_tuned(fot_here, own, tmp_path: Path) -> None:
    recipe, _ = own
    refused(fot_here("run", recipe, "--set", "base.checkpoint=nowhere"), "nowhere is no directory: give a Hugging Face")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"")
    refused(fot_here("run", recipe, "--set", f"base.checkpoint={tmp_path / 'gpt2'}"), "is no LLaMA", "'gpt2'")
    big = tmp_path / "big"
    big.mkdir()
    train_tokenizer([(tmp_path / "corpus.jsonl").read_text()], 320, big)
    refused(
        fot_here("run", recipe, "--set", f"tokenizer.path={big}"),
        "the tokenizer has 320 tokens, the model in",
        "only 300: set tokenizer.path to the model's own tokenizer",
    )
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(["other words altogether " * 9], 280, other)
    refused(
        fot_here("run", recipe, "--set", f"tokenizer.path={other}"),
        "there, but not in the tokenizer of the model in",
        "unset tokenizer.path",
    )
    layers = fot_here("run", recipe, "--set", "finetune.objective.mem_layers=[0, 1, 2, 3]")
    refused(layers, "mem_layers [2, 3]: the model in", "has 2 layers, 0 to 1")


def test_batches_that_do_not_fit_the_workers_or_what_is_seen(fot_here, own) -> None:
    recipe, _ = own
    for setting, words in (
        (
            "finetune.batch.micro_batches=3",
            "finetune.batch.micro_batches (3) is not a multiple of resources.workers (2)",
        ),
        (
            "resources.ranks_per_micro_batch=3",
            "resources.workers (2) is not a multiple of resources.ranks_per_micro_batch",
        ),
        (
            "finetune.objective={kind: fot, context: 16, d: 9}",
            "objective.d is 9, a micro-batch holds 2 document groups",
        ),
        ("finetune.objective.segments=[[0, 0], [1, 9]]", "asks for 9 negatives, a micro-batch of 2 groups holds 2"),
    ):
        refused(fot_here("run", recipe, "--set", setting), words)
    odd = ["--set", "finetune.batch.groups=3", "--set", "resources.ranks_per_micro_batch=2"]
    refused(
        fot_here("run", recipe, *odd), "finetune.batch.groups (3) is not a multiple of resources.ranks_per_micro_batch"
    )


def test_more_workers_than_there_are(fot_here, own) -> None:
    recipe, _ = own
    many = ["--set", "resources.workers=64", "--set", "finetune.batch.micro_batches=64"]
    refused(fot_here("run", recipe, *many), "resources: 64 workers with 1 CPU each do not fit, Ray has room for")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_of_another_training_are_not_gone_on_from(fot_here, own, corpus: Path, tmp_path: Path) -> None:
    recipe, _ = own
    kept = tmp_path / "kept"
    place = ["--set", "finetune.checkpoints.path=kept"]  # workers have working directories of their own
    assert fot_here("run", recipe, *place).returncode == 0
    steps = sorted(path.name for path in (kept / "finetune").iterdir())
    assert steps[-1] == "step-00000006"

    for setting, key in (
        ("finetune.optimizer.learning_rate=0.5", "training.optimizer.learning_rate"),
        ("data.sources.0.held_out=0.4", "held_out and duplicates"),
        ("finetune.schedule.kind=cosine", "training.s"),  # now the number of steps decides, too
    ):
        changed = fot_here("run", recipe, *place, "--set", setting)
        refused(changed, str(kept / "finetune"), f"was trained with {key}", "set another checkpoints.path")
    fewer = fot_here("run", recipe, *place, "--set", "finetune.steps=4")
    refused(fewer, "are at step 6, the training is to end at 4: raise its steps to 6 or more")
    exported = fot_here("export", kept / "finetune" / "step-00000004", tmp_path / "exported")
    assert exported.stdout == f"exported to {tmp_path / 'exported'}\n"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "exported").config.vocab_size == 300
    again = fot_here("export", kept / "finetune", tmp_path / "exported")
    refused(again, f"{tmp_path / 'exported'} exists: remove it")
    with open(corpus, "a") as file:
        file.write(json.dumps({"id": "new", "text": "a new document " * 50}) + "\n")
    refused(
        fot_here("run", recipe, *place), str(kept / "finetune"), "the data set has changed since", "checkpoints.path"
    )

    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:-1]))
    longer = fot_here("run", recipe, *place, "--set", "finetune.steps=8", "--set", "resources.workers=1")
    assert longer.returncode == 0, longer.stdout  # more steps, another number of workers: the same training goes on
    assert (kept / "finetune" / "step-00000008").is_dir()
