"""`fot evaluate` on a checkpoint made on the spot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM, fingerprint
from jobs.cli.commands.evaluate import _merged
from jobs.measures.result import Result
from jobs.workflow.workspace import WorkDir
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path, corpus: Path) -> Path:
    """A FoT model of two layers with its tokenizer, untrained."""
    path = tmp_path / "model"
    path.mkdir()
    train_tokenizer([corpus.read_text()], 300, path)
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        mem_layers=[1],
        bos_token_id=0,
        eos_token_id=1,
    )
    FotLlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_base_and_its_adapter_are_one_model_made_once(checkpoint: Path, tmp_path: Path) -> None:
    base = FotLlamaForCausalLM.from_pretrained(checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {name: torch.ones_like(base.get_parameter(name))}
    Adapter(fingerprint(base), {"mem_layers": [0, 1]}, tensors=tensors).save(tmp_path / "adapter")
    work = WorkDir("mine", str(tmp_path / "runs"))
    work.directory.mkdir()
    merged = _merged(checkpoint, tmp_path / "adapter", work)
    found = FotLlamaForCausalLM.from_pretrained(merged)
    assert found.config.mem_layers == [0, 1]
    assert torch.equal(found.get_parameter(name), tensors[name])
    assert (merged / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert _merged(checkpoint, tmp_path / "adapter", work) == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == written
    Adapter("0" * 32, {}, tensors=tensors).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"^the adapter was trained from another base than "):
        _merged(checkpoint, tmp_path / "other", work)


def only(directory: Path) -> Path:
    (found,) = (path for path in directory.glob("*") if path.is_dir())
    return found


def test_a_checkpoint_is_measured_and_recorded_and_found_again(
    fot_here, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    asked = ["evaluate", checkpoint, "--task", "perplexity", "--task", "passkey", "--data", corpus]
    asked += ["--base", checkpoint, "--local", "16"]
    sets = ["perplexity.contexts=[1,4]", "perplexity.windows=4", "passkey={lengths: [20], trials: 2, digits: 2}"]
    asked += [part for each in sets for part in ("--set", each)]
    answer = fot_here(*asked, "--name", "mine")
    assert answer.returncode == 0, answer.stdout
    for shown in ("perplexity, base", "perplexity, model", "Passkey", "report.html", "MLflow run"):
        assert shown in answer.stdout
    store = tmp_path / "runs" / "store"
    result = Result.read(only(store / "perplexity"))
    values = {point.metric: point.value for point in result.points if point.step == 64}
    assert values["perplexity/model"] == values["perplexity/base"]  # the same checkpoint
    page = (only(store / "report") / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert str(checkpoint) in page
    listed = fot_here("registry", "list").stdout
    assert "mine" in listed
    assert "evaluation" in listed
    again = fot_here(*asked, "--name", "mine")
    assert "perplexity found" in again.stdout
    assert fot_here("registry", "list").stdout.count("evaluation") == listed.count("evaluation")


def test_rivals_stand_beside_the_model(fot_here, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    asked = ["evaluate", checkpoint, "--task", "perplexity", "--data", corpus, "--local", "16"]
    asked += ["--set", "perplexity={contexts: [1, 4], windows: 4}", "--rival", "full"]
    answer = fot_here(*asked)
    assert answer.returncode == 0, answer.stdout
    for shown in ("base, full attention", "Nats a token, model less each"):
        assert shown in answer.stdout
    result = Result.read(only(tmp_path / "runs" / "store" / "rivals"))
    assert {("perplexity/full", 16), ("nats_less/full", 64)} <= {(point.metric, point.step) for point in result.points}
    more = fot_here(*asked, "--set", "memory.top_k=4")
    assert "perplexity-full found" in more.stdout, "with another memory no rival is measured anew"
    assert "perplexity done in" in more.stdout
    base = FotLlamaForCausalLM.from_pretrained(checkpoint)
    tensors = {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 32)}
    Adapter(fingerprint(base), {"mem_layers": [1]}, tensors=tensors).save(tmp_path / "adapter")
    adapted = fot_here(*asked, "--adapter", tmp_path / "adapter", "--set", "dtype=bfloat16", "--name", "adapted")
    assert adapted.returncode == 0, adapted.stdout
    for shown in ("perplexity, base", "base, full attention"):
        assert shown in adapted.stdout, "rivals read the checkpoint without the adapter"


def test_an_edited_question_file_is_asked_anew(fot_here, checkpoint: Path, tmp_path: Path) -> None:
    questions = [{"question": f"what is {word} ?", "fine": "DESC:def", "coarse": "DESC"} for word in "abcdefgh"]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    asked = ["evaluate", checkpoint, "--task", "trec", "--set", "trec={train: train.jsonl, test: test.jsonl, "]
    asked[-1] += "lengths: [4], draws: 1, questions: 1}"
    assert fot_here(*asked).returncode == 0
    (tmp_path / "test.jsonl").write_text(json.dumps(questions[0]) + "\n")
    again = fot_here(*asked)
    assert again.returncode == 0
    assert "trec done in" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "paskey"], "--task paskey is unknown: did you mean passkey?"),
        (["--task", "zzz"], "--task zzz is unknown: give one of perplexity, passkey"),
        (["--task", "perplexity"], "perplexity is measured on text: give some with --data FILES"),
        (["--task", "trec"], "trec.train is missing"),
        (
            ["--task", "passkey", "--set", "passkey.lengs=[1]"],
            "unknown key passkey.lengs: did you mean passkey.lengths?",
        ),
        (["--task", "passkey", "--set", "passkey.lengths=[1]"], "raise the shortest of evaluation.passkey.lengths to "),
        (
            ["--task", "passkey", "--set", "evaluation.passkey.lengths=[1]"],
            "passkey at 1 x 64 tokens: the prompt needs",
        ),
        (["--task", "passkey", "--set", "evaluation.memory.dtype=f"], "memory.dtype = 'f'"),
        (
            ["--task", "passkey", "--set", "perplexity.windows=3"],
            "--set perplexity.windows=3: perplexity is not asked for: add --task perplexity or leave this out",
        ),
        (["--task", "passkey", "--set", "lm_eval={tasks: [arc_easy]}"], "lm_eval is not asked for: add --task lm_eval"),
        (["--task", "passkey", "--name", "a b/c"], "name = 'a b/c': string should match"),
        (["--task", "passkey", "--local", "128"], "its local context holds up to 64 tokens, not 128: lower --local"),
        (["--task", "passkey", "--local", "8"], "takes up to 8 tokens, more than a local context of 8 holds"),
        (
            ["--task", "perplexity", "--data", "q.jsonl", "--base", "flat"],
            "flat: it has 1 layers, the memory layers of",
        ),
        (["--task", "trec", "--local", "16", "--set", "trec={train: q.jsonl, test: q.jsonl}"], "cannot be asked"),
        (
            ["--task", "passkey", "--set", "passkey.lengths=[100000000]"],
            "passkey at 6400000000 tokens, 1 prompts at once (evaluation.passkey.at_once) needs about ",
        ),
        (["--task", "perplexity", "--data", "nothing.txt"], "nothing.txt"),
        (["--task", "passkey", "--rival", "dynamc_ntk"], "rival dynamc_ntk is unknown: did you mean dynamic_ntk?"),
        (["--task", "passkey", "--rival", "xxx"], "rival xxx is unknown: give one of full, yarn, dynamic_ntk, bm25"),
        (["--task", "trec", "--rival", "full", "--set", "trec={train: q.jsonl, test: q.jsonl}"], "are measured in"),
        (
            ["--task", "passkey", "--rival", "full", "--set", "rivals_up_to=8"],
            "rivals_up_to is 8 tokens, the shortest length of evaluation.passkey 64: raise the one or lower the other",
        ),
    ],
)
def test_a_mistake_is_one_line(fot_here, checkpoint: Path, arguments: list[str], message: str) -> None:
    (checkpoint.parent / "q.jsonl").write_text('{"question": "what is an acorn ?", "fine": "DESC:def"}\n')
    shallow = FotLlamaConfig.from_pretrained(checkpoint, num_hidden_layers=1, mem_layers=[])
    FotLlamaForCausalLM(shallow).save_pretrained(checkpoint.parent / "flat")
    (checkpoint.parent / "flat" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    answer = fot_here("evaluate", checkpoint, *arguments)
    assert answer.returncode == 2
    assert message in answer.stdout.splitlines()[-1]


def test_what_is_no_model_to_evaluate_is_one_line(fot_here, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "training" / "step-00000100").mkdir(parents=True)
    for name in ("part", "narrow", "unread"):
        shutil.copytree(checkpoint, tmp_path / name)
    weights = load_file(tmp_path / "part" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "norm" not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors")
    narrow = FotLlamaConfig.from_pretrained(checkpoint, vocab_size=9)
    FotLlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    (tmp_path / "unread" / "tokenizer.json").write_text("{")
    (checkpoint / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for path, message in (
        (checkpoint, "has no tokenizer: put its tokenizer.json"),
        (tmp_path / "part", "part lacks model.layers.0.input_layernorm.weight, "),
        (tmp_path / "narrow", "narrow only 9: set tokenizer.path"),
        (tmp_path / "unread", "unread cannot be read ("),
        (tmp_path / "training", "holds a training's checkpoints: `fot export"),
        (tmp_path / "none", "is no directory"),
        ("models:/fot/none@champion", "models:/fot/none"),
    ):
        answer = fot_here("evaluate", path, "--task", "passkey")
        assert answer.returncode == 2
        assert message in answer.stdout.splitlines()[-1]
