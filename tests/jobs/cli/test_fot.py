import errno
import json
import time
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from jobs.cli.fot import fot as fot_group
from jobs.common.errors import user_message
from pipelines.workflow.errors import UserError


def test_help_answers_in_under_a_second(fot) -> None:
    fot("--help")  # the first start compiles byte code
    began = time.monotonic()
    answer = fot("--help")
    assert time.monotonic() - began < 1.0
    assert answer.returncode == 0
    assert "run" in answer.stdout
    assert "status" in answer.stdout


def test_an_unknown_command_is_a_usage_error(fot) -> None:
    assert fot("rnu").returncode == 2


def test_ctrl_c_in_any_command_is_one_line_and_130(monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.cli.commands.cluster.show_jobs", interrupted)
    monkeypatch.setattr("jobs.cli.fot.prepare_environment", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        fot_group(["jobs"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fot: interrupted; what was done is kept\n"


def test_a_users_mistake_inside_a_ray_task_is_found() -> None:
    error = RayTaskError("f", "traceback", UserError("mend it"))
    assert user_message(error) == "mend it"
    assert user_message(error.as_instanceof_cause()) == "mend it"


def test_a_full_disk_is_a_users_error_and_a_bug_is_not() -> None:
    message = user_message(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert message is not None
    assert "/data/x" in message
    assert user_message(ValueError("bug")) is None
    assert user_message(OSError(errno.EIO, "broken")) is None


@pytest.fixture
def one_line(fot_here):
    """Runs `fot run` and checks: exit code 2, one clear line as the last, no traceback. Returns the line."""

    def run(path: Path, *overrides: str) -> str:
        sets = [argument for override in overrides for argument in ("--set", override)]
        answer = fot_here("run", path, *sets)
        assert answer.returncode == 2, answer.stdout
        assert "Traceback" not in answer.stdout
        line = answer.stdout.splitlines()[-1]
        assert line.startswith("fot: ")
        return line

    return run


def test_mistakes_seen_before_anything_runs_are_one_line(one_line, recipe: dict, write_recipe, tmp_path: Path) -> None:
    path = write_recipe(recipe)
    assert "unknown key finetune.stepz" in one_line(path, "finetune.stepz=1")
    assert "does not exist" in one_line(path, f"data.sources.0.path={tmp_path}/nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no files" in one_line(path, f"data.sources.0.path={tmp_path}/empty")
    assert "recipe" in one_line(tmp_path / "nothing.yaml")


def test_a_checkpoint_that_is_no_llama_is_one_line(one_line, recipe: dict, write_recipe, tmp_path: Path) -> None:
    model = tmp_path / "model"
    recipe["base"] = {"checkpoint": str(model)}
    path = write_recipe(recipe)
    assert "is no directory" in one_line(path)
    model.mkdir()
    assert "it has no config.json" in one_line(path)
    (model / "config.json").write_text("{")
    assert "is not JSON" in one_line(path)
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert "is no LLaMA: its config.json says model_type 'gpt2'" in one_line(path)
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert "its config.json has no vocab_size" in one_line(path)
    sizes = {"vocab_size": 300, "num_hidden_layers": 1, "max_position_embeddings": 32, "hidden_size": 8}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    assert "holds no weights" in one_line(path)


def test_mistakes_in_the_corpus_are_one_line_and_nothing_is_trusted_later(
    one_line, fot_here, recipe: dict, write_recipe, corpus: Path, tmp_path: Path
) -> None:
    path = write_recipe(recipe)
    good = corpus.read_text()
    corpus.write_text(good + "{broken\n")
    line = one_line(path)
    assert f"{corpus}, line 25" in line
    assert "max_bad_documents" in line
    corpus.write_text("\n\n")
    assert "empty" in one_line(path)
    corpus.write_text('{"id": "a", "text": "short"}\n' * 1 + good[: good.index("\n") + 1])
    assert "no held-out document" in one_line(path)
    finished = {directory.name for directory in (tmp_path / "runs" / "store").glob("*/*") if directory.is_dir()}
    assert not [name for stage in ("base", "finetune") for name in finished if name.startswith(stage)]
    assert "waiting" in fot_here("status", path).stdout


def test_more_workers_than_cores_is_one_line(one_line, recipe: dict, write_recipe) -> None:
    path = write_recipe(recipe)
    many = ["finetune.batch.micro_batches=512", "base.pretrain.training.batch.micro_batches=512"]
    line = one_line(path, "resources.workers=512", *many)
    assert "512 workers" in line
    assert "--set resources.workers=" in line


def test_a_work_dir_that_cannot_be_written_is_one_line(one_line, recipe: dict, write_recipe) -> None:
    assert "work_dir" in one_line(write_recipe(recipe), "work_dir=/proc/nowhere")
