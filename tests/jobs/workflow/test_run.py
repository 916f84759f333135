"""The whole path through the command line, undisturbed and killed."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.config.train_spec import METRICS
from jobs.measures.result import Result
from jobs.registry.models import fetch_model
from jobs.registry.server import embedded_uri, find_run
from jobs.registry.tracking import RUN
from jobs.train.metrics import last_metrics, read_metrics
from pipelines.tokens.tokenizer import train_tokenizer

RECIPES = Path(__file__).parents[3] / "recipes"
DATA = ["tokenizer", "shards", "index", "base-groups", "finetune-groups"]
STAGES = [*DATA, "base", "finetune", "perplexity", "passkey", "report"]


@pytest.fixture
def path(recipe: dict, write_recipe) -> Path:
    """The tiny recipe with trainings long enough to be killed in."""
    for training in (recipe["base"]["pretrain"]["training"], recipe["finetune"]):
        training |= {"steps": 200, "checkpoints": {"every": 20}}
    return write_recipe(recipe)


def outputs(work_dir: Path) -> dict[str, Path]:
    """The finished output of every stage that the recipe has."""
    found = {stage: list((work_dir / "store" / stage).glob("*/stage.json")) for stage in STAGES}
    return {stage: record.parent for stage, (record, *_) in ((s, f) for s, f in found.items() if f)}


def test_a_run_makes_all_it_promises_and_a_second_one_finds_it(fot, fot_here, path: Path, tmp_path: Path) -> None:
    answer = fot("run", path)
    assert answer.returncode == 0, answer.stdout
    work_dir = tmp_path / "runs"
    made = outputs(work_dir)
    for shown in ("perplexity, model", "Passkey", str(made["finetune"] / "model"), "models:/fot/tiny/1", "registry ui"):
        assert shown in answer.stdout
    for stage in STAGES:
        assert f"{stage} done in" in answer.stdout
    for noise in ("WARNING", "INFO", "Loading weights", "Traceback"):
        assert noise not in answer.stdout

    result = Result.read(made["perplexity"])
    lengths = {point.step: point.value for point in result.points if point.metric == "perplexity/model"}
    assert set(lengths) == {16, 32, 64}
    assert (made["perplexity"] / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert {point.step for point in Result.read(made["passkey"]).points if point.metric == "passkey/exact"} == {320}

    client = mlflow.MlflowClient(embedded_uri(work_dir))
    recorded = recorded_run(client, made["report"].name)
    assert recorded.data.metrics["perplexity/model"] == lengths[64]
    assert recorded.data.tags["fot.gate"] == "not promoted"
    for stage in ("base", "finetune"):
        training = training_run(client, made[stage])
        assert training.data.tags["mlflow.parentRunId"] == recorded.info.run_id
        assert training.info.status == "FINISHED"
        place = Path(training.data.tags["fot.checkpoints"])
        assert [path.name for path in sorted(place.glob("step-*"))] == ["step-00000180", "step-00000200"]
        kept = mlflow.artifacts.load_dict(f"{training.info.artifact_uri}/recipe.json")
        assert kept["finetune"]["steps"] == 200
        written = [(entry["step"], entry["loss"]) for entry in read_metrics(made[stage] / METRICS)]
        history = client.get_metric_history(training.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == written
        assert len(written) == 200
    model = fetch_model("models:/fot/tiny@candidate", embedded_uri(work_dir), tmp_path / "fetched")
    loaded = FotLlamaForCausalLM.from_pretrained(model)
    assert loaded.config.mem_layers == [1]
    ids = AutoTokenizer.from_pretrained(model)("abc def " * 100, return_tensors="pt").input_ids
    assert len(loaded(ids).past_key_values.memory) > 0
    artifacts = {artifact.path for artifact in client.list_artifacts(recorded.info.run_id)}
    assert {
        "recipe.json",
        "lineage.json",
        "report.html",
        "manifest.json",
        "perplexity",
        "passkey",
        "model",
    } <= artifacts
    lineage = json.loads((made["report"] / "lineage.json").read_text())
    assert lineage["finetune"]["inputs"]["shards"] == lineage["shards"]["key"]

    again = fot_here("run", path)
    assert again.returncode == 0
    assert all(f"{stage} found" in again.stdout for stage in STAGES)
    status = fot_here("status", path).stdout
    assert status.count(" done ") == len(STAGES)

    corrupt = next(made["shards"].glob("*.arrow"))
    content = corrupt.read_bytes()
    corrupt.write_bytes(content[:-1000] + b"x" + content[-999:])
    mended = fot_here("run", path)
    assert mended.returncode == 0
    assert f"{corrupt} is corrupt; it is made again" in mended.stdout
    assert corrupt.read_bytes() == content
    assert all(f"{stage} found" in mended.stdout for stage in STAGES if stage != "shards")


def training_run(client: mlflow.MlflowClient, output: Path) -> mlflow.entities.Run:
    """The run of the training that wrote there."""
    facts = json.loads((output / RUN).read_text())
    run = find_run(client, facts["experiment"], facts["key"])
    assert run is not None
    return run


def recorded_run(client: mlflow.MlflowClient, key: str) -> mlflow.entities.Run:
    run = find_run(client, "tiny", key)
    assert run is not None
    return run


Moment = Callable[[Path], bool]


def at_step(stage: str, step: int) -> Moment:
    def reached(work_dir: Path) -> bool:
        for metrics in (work_dir / "store" / stage).glob(f"*.partial/{METRICS}"):
            last = last_metrics(metrics)
            return last is not None and last["step"] >= step
        return False

    return reached


def perplexity_begun(work_dir: Path) -> bool:
    return any((work_dir / "store" / "perplexity").glob("*.partial"))


def check_kills(moments: list[Moment], signal_number: int, fot, start_fot, arguments: list[str], cwd: Path) -> None:
    """A run that is killed at each of the moments, and then left to end, has the losses of one that was not."""
    work_dir = cwd / "runs"
    answer = fot("run", *arguments)
    assert answer.returncode == 0, answer.stdout
    undisturbed = losses(work_dir)
    assert undisturbed["finetune"]
    shutil.rmtree(work_dir)

    for moment in moments:
        process = start_fot("run", *arguments)
        while not moment(work_dir):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal_number)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130), printed
        assert "Traceback" not in printed
        shown = fot("status", *arguments).stdout
        assert "interrupted" in shown, shown
    answer = fot("run", *arguments)
    assert answer.returncode == 0, answer.stdout
    assert losses(work_dir) == undisturbed
    client = mlflow.MlflowClient(embedded_uri(work_dir))
    for stage, expected in undisturbed.items():
        if expected:
            run = training_run(client, outputs(work_dir)[stage])
            history = client.get_metric_history(run.info.run_id, "loss")
            assert [(point.step, point.value) for point in history] == expected  # one run, no point twice
            assert len(client.search_runs([run.info.experiment_id])) == 1 + len(
                [one for one in undisturbed.values() if one]
            )


def losses(work_dir: Path) -> dict[str, list[tuple[float, float]]]:
    made = outputs(work_dir)
    return {
        stage: [(entry["step"], entry["loss"]) for entry in read_metrics(made[stage] / METRICS)]
        for stage in ("base", "finetune")
    }


@pytest.fixture
def own_material(tmp_path: Path, corpus: Path) -> list[str]:
    """The shipped recipe for one's own LLaMA and text, at a small size."""
    model = tmp_path / "llama"
    model.mkdir()
    train_tokenizer([corpus.read_text()], 300, model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    settings = {
        "base.checkpoint": model,
        "data.sources.0.path": corpus,
        "data.sources.0.held_out": 0.3,
        "finetune.objective.context": 16,
        "finetune.steps": 200,
        "finetune.checkpoints.every": 20,
        "finetune.optimizer.learning_rate": 0.001,
        "evaluation.perplexity": "{contexts: [1, 4], windows: 8}",
        "evaluation.passkey": "{lengths: [20], trials: 2, digits: 2}",
    }
    return [str(RECIPES / "finetune.yaml"), *(f"--set={key}={value}" for key, value in settings.items())]


def test_ones_own_llama_is_fine_tuned_and_a_kill_in_training_changes_nothing(
    fot, fot_here, start_fot, own_material: list[str], tmp_path: Path
) -> None:
    check_kills([at_step("finetune", 50)], signal.SIGKILL, fot, start_fot, own_material, tmp_path)
    made = outputs(tmp_path / "runs")
    tuned = FotLlamaForCausalLM.from_pretrained(made["finetune"] / "model")
    assert (tuned.config.mem_layers, tuned.config.local_context) == ([1], 16)
    assert tuned.config.num_key_value_heads == 2
    assert (made["base"] / "model").resolve() == tmp_path / "llama"

    for problem, message in (
        ("finetune.objective.context=64", "was made for 32"),
        ("finetune.objective.mem_layers=[7]", "has 2 layers, 0 to 1"),
    ):
        answer = fot_here("run", *own_material, f"--set={problem}")
        assert answer.returncode == 2
        assert message in answer.stdout.splitlines()[-1]
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    answer = fot_here("run", *own_material)
    assert answer.returncode == 2
    assert f"{weights} is damaged" in answer.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_in_every_stage_goes_on_bit_for_bit(fot, start_fot, path: Path) -> None:
    moments = [at_step("base", 5), at_step("base", 110), at_step("finetune", 50), perplexity_begun]
    check_kills(moments, signal.SIGKILL, fot, start_fot, [str(path)], path.parent)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_leaves_one_line_and_the_same_command_goes_on(fot, start_fot, path: Path) -> None:
    moments = [at_step("finetune", 50), perplexity_begun]
    check_kills(moments, signal.SIGINT, fot, start_fot, [str(path)], path.parent)


@pytest.mark.parametrize("size", ["64k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("400k", "3500k"))])
def test_a_full_disk_is_one_line(fot, path: Path, tmp_path: Path, size: str) -> None:
    """In a mount namespace of its own: work_dir on a file system that fills up in the shards, or at a checkpoint."""
    work_dir = tmp_path / "runs"
    work_dir.mkdir()
    script = f'mount -t tmpfs -o size={size} tmpfs {work_dir} && "$@"'
    mount = ("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh")
    if subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mount namespaces, so no small file system can be had")
    answer = fot("run", path, prefix=mount)
    assert answer.returncode == 2, answer.stdout
    assert "no space left on the device" in answer.stdout.splitlines()[-1]
    assert "Traceback" not in answer.stdout
