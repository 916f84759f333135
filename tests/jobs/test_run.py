"""The whole path through the command line, undisturbed and killed."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest
from transformers import AutoTokenizer

from fot_model import DenseMemory, FotLlamaForCausalLM
from jobs.registry import tracking_uri
from jobs.train.launch import last_metrics, read_metrics
from jobs.train.spec import METRICS

STAGES = ["tokenizer", "shards", "base", "finetune", "perplexity", "passkey", "register"]


@pytest.fixture
def path(recipe: dict, write_recipe) -> Path:
    """The tiny recipe with trainings long enough to be killed in."""
    for training in (recipe["base"]["pretrain"]["training"], recipe["finetune"]):
        training |= {"steps": 200, "checkpoint_every": 20}
    return write_recipe(recipe)


def outputs(work_dir: Path) -> dict[str, Path]:
    """The finished output of every stage."""
    return {stage: next(path.parent for path in (work_dir / "store" / stage).glob("*/stage.json")) for stage in STAGES}


def test_a_run_makes_all_it_promises_and_a_second_one_finds_it(fot, path: Path, tmp_path: Path) -> None:
    answer = fot("run", path)
    assert answer.returncode == 0, answer.stdout
    work_dir = tmp_path / "runs"
    made = outputs(work_dir)
    for shown in ("perplexity FoT", "passkey", str(made["finetune"] / "model"), "models:/tiny/1", "mlflow ui"):
        assert shown in answer.stdout
    for stage in STAGES:
        assert f"{stage} done in" in answer.stdout
    for noise in ("WARNING", "INFO", "Loading weights", "Traceback"):
        assert noise not in answer.stdout

    results = json.loads((made["perplexity"] / "perplexity.json").read_text())
    assert set(results["fot"]) == {"1", "2", "4"}
    assert (made["perplexity"] / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((made["passkey"] / "passkey.json").read_text())) == {"local_context", "20"}

    run = json.loads((made["register"] / "run.json").read_text())
    mlflow.set_tracking_uri(tracking_uri(work_dir))
    client = mlflow.MlflowClient()
    recorded = client.get_run(run["run_id"])
    assert recorded.data.metrics["perplexity/fot"] == results["fot"]["4"]
    assert len(client.get_metric_history(run["run_id"], "finetune/loss")) == 200
    model = mlflow.artifacts.download_artifacts(f"models:/tiny/{run['version']}", dst_path=str(tmp_path / "fetched"))
    loaded = FotLlamaForCausalLM.from_pretrained(model)
    assert loaded.config.mem_layers == [1]
    memory = DenseMemory()
    loaded(AutoTokenizer.from_pretrained(model)("abc def", return_tensors="pt").input_ids, memory=memory)
    assert len(memory) > 0
    artifacts = {artifact.path for artifact in client.list_artifacts(run["run_id"])}
    assert {"recipe", "lineage", "perplexity", "passkey", "model"} <= artifacts
    lineage = json.loads((made["register"] / "lineage.json").read_text())
    assert lineage["finetune"]["inputs"]["shards"] == lineage["shards"]["key"]

    again = fot("run", path)
    assert again.returncode == 0
    assert all(f"{stage} found" in again.stdout for stage in STAGES)
    status = fot("status", path).stdout
    assert status.count(" done ") == len(STAGES)

    corrupt = next(made["shards"].glob("*.arrow"))
    content = corrupt.read_bytes()
    corrupt.write_bytes(content[:-1000] + b"x" + content[-999:])
    mended = fot("run", path)
    assert mended.returncode == 0
    assert f"{corrupt} is corrupt; it is made again" in mended.stdout
    assert corrupt.read_bytes() == content
    assert all(f"{stage} found" in mended.stdout for stage in STAGES if stage != "shards")


def at_step(stage: str, step: int) -> Callable[[Path], bool]:
    def reached(work_dir: Path) -> bool:
        for metrics in (work_dir / "store" / stage).glob(f"*.partial/{METRICS}"):
            last = last_metrics(metrics)
            return last is not None and last["step"] >= step
        return False

    return reached


def a_shard(work_dir: Path) -> bool:
    return any((work_dir / "store" / "shards").glob("*.partial/*.arrow"))


def perplexity_begun(work_dir: Path) -> bool:
    return any((work_dir / "store" / "perplexity").glob("*.partial"))


def check_kills(moments: list[Callable[[Path], bool]], signal_number: int, fot, start_fot, path: Path) -> None:
    """A run that is killed at each of the moments, and then left to end, has the losses of one that was not."""
    work_dir = path.parent / "runs"
    assert fot("run", path).returncode == 0
    stages = ("base", "finetune")
    undisturbed = {stage: read_metrics(outputs(work_dir)[stage] / METRICS) for stage in stages}
    shutil.rmtree(work_dir)

    for moment in moments:
        process = start_fot("run", path)
        while not moment(work_dir):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal_number)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130), printed
        assert "Traceback" not in printed
        shown = fot("status", path).stdout
        assert "interrupted" in shown, shown
    answer = fot("run", path)
    assert answer.returncode == 0, answer.stdout
    made = outputs(work_dir)
    for stage in stages:
        losses = [(entry["step"], entry["loss"]) for entry in read_metrics(made[stage] / METRICS)]
        assert losses == [(entry["step"], entry["loss"]) for entry in undisturbed[stage]]
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(path) in (process.info["cmdline"] or [])]


def test_a_run_killed_in_training_goes_on_bit_for_bit(fot, start_fot, path: Path) -> None:
    check_kills([at_step("finetune", 50)], signal.SIGKILL, fot, start_fot, path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_in_every_stage_goes_on_bit_for_bit(fot, start_fot, path: Path) -> None:
    moments = [a_shard, at_step("base", 5), at_step("base", 110), at_step("finetune", 50), perplexity_begun]
    check_kills(moments, signal.SIGKILL, fot, start_fot, path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_leaves_one_line_and_the_same_command_goes_on(fot, start_fot, path: Path) -> None:
    check_kills([at_step("base", 30), at_step("finetune", 50)], signal.SIGINT, fot, start_fot, path)


def test_a_full_disk_is_one_line(fot, path: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own: work_dir on a file system of 400 kB."""
    work_dir = tmp_path / "runs"
    work_dir.mkdir()
    mount = (
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=400k t {work_dir} && "$@"',
        "sh",
    )
    if subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mount namespaces, so no small file system can be had")
    answer = fot("run", path, prefix=mount)
    assert answer.returncode == 2, answer.stdout
    assert "no space left on the device" in answer.stdout.splitlines()[-1]
    assert "Traceback" not in answer.stdout
