"""Outcomes become runs and model versions once, through the gate, whatever is interrupted."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.registry import FINISHED, GATE, aliases
from mlflow.tracking import MlflowClient

from jobs.registry.outbox import Outbox
from jobs.registry.record import record, register
from jobs.registry.runs import children
from jobs.registry.server import connect, embedded_uri, find_run, open_run
from pipelines.workflow.errors import UserError


def test_an_outcome_becomes_a_run_with_its_training_and_a_version_with_its_gate(work_dir: Path, make_outcome) -> None:
    made = record(make_outcome(), work_dir, GATE)
    assert (made["model"], made["version"], made["gate"]) == ("fot.tiny", "1", "promoted")
    client = connect(embedded_uri(work_dir))
    run = client.get_run(made["run_id"])
    assert (run.info.status, run.data.tags["fot.kind"], run.data.params) == (
        "FINISHED",
        "recipe",
        {"seed": "0", "steps": "3"},
    )
    note = run.data.tags["mlflow.note.content"].splitlines()
    assert note[0] == "**tiny**, version 1 of `models:/fot/tiny`"
    assert note[2:5] == ["Gate: promoted", "", "- pass: passkey/exact at 2048 is 0.95, wanted at least 0.9"]
    assert note[6:8] == ["| tokens | 512 | 2048 |", "| --- | ---: | ---: |"]
    assert note[9:] == ["| perplexity/base | 10 |  |", "| perplexity/model | 10.05 | 9.5 |"]
    history = client.get_metric_history(run.info.run_id, "perplexity/model")
    assert {point.step: point.value for point in history} == {512: 10.05, 2048: 9.5}
    training = find_run(client, "tiny", "finetune-one")
    assert (training.data.tags["mlflow.parentRunId"], training.info.status) == (run.info.run_id, "FINISHED")
    assert [point.value for point in client.get_metric_history(training.info.run_id, "loss")] == [3, 2, 1]

    version = client.get_model_version("fot.tiny", "1")
    reason = "pass: passkey/exact at 2048 is 0.95, wanted at least 0.9"
    assert version.tags == {
        "fot.base": "a llama",
        "fot.gate": "promoted",
        "fot.gate_reasons": reason,
        "fot.manifest": "abc",
        "fot.passkey_90": "2048",
        "fot.time": "2023-11-14T22:13:20.000000+00:00",
        "fot.tokens_seen": "12",
    }
    assert version.description == f"Of the recipe tiny, run {run.info.run_id}."
    assert (run.data.tags["fot.gate"], run.data.tags["fot.gate_reasons"]) == ("promoted", reason)
    told = client.download_artifacts(run.info.run_id, "gate.json", str(work_dir))
    assert json.loads(Path(told).read_text())["reasons"] == [reason]
    assert aliases(work_dir) == {"candidate": "1", "champion": "1"}


def test_only_the_gate_makes_a_champion_and_no_older_version_takes_an_alias_back(work_dir: Path, make_outcome) -> None:
    assert record(make_outcome("one"), work_dir, GATE)["gate"] == "promoted"
    assert record(make_outcome("two", passkey=0.5), work_dir, GATE)["gate"] == "not promoted"
    assert record(make_outcome("three"), work_dir)["gate"] == "not promoted"  # no conditions
    assert aliases(work_dir) == {"candidate": "3", "champion": "1"}
    client = connect(embedded_uri(work_dir))
    client.set_registered_model_alias("fot.tiny", "champion", "2")  # by hand
    record(make_outcome("one"), work_dir, GATE)
    assert aliases(work_dir) == {"candidate": "3", "champion": "2"}
    assert client.get_model_version("fot.tiny", "2").tags["fot.passkey_90"] == "512"
    record(make_outcome("four"), work_dir, GATE)
    client.set_registered_model_alias("fot.tiny", "champion", "1")  # the older one after all
    record(make_outcome("four"), work_dir, GATE)
    assert aliases(work_dir) == {"candidate": "4", "champion": "1"}
    client.delete_tag(find_run(client, "tiny", "two").info.run_id, "fot.gate")  # as if it had been cut short there
    record(make_outcome("two", passkey=0.5), work_dir, GATE)
    assert aliases(work_dir) == {"candidate": "4", "champion": "1"}


def test_recording_again_doubles_nothing_and_completes_what_was_cut_short(
    work_dir: Path, make_outcome, monkeypatch
) -> None:
    """Each of the calls that write fails once; after every failure the same outcome is recorded again."""

    class KilledError(BaseException):
        pass

    writes = ["log_batch", "log_artifact", "log_artifacts", "create_model_version", "set_registered_model_alias"]
    for name in [*writes, "set_model_version_tag", "set_terminated"]:
        with monkeypatch.context() as here:

            def killed(*_: object, **__: object) -> None:
                raise KilledError

            here.setattr(MlflowClient, name, killed)
            with pytest.raises(KilledError):
                record(make_outcome(), work_dir, GATE)
    made = record(make_outcome(), work_dir, GATE)
    later = [(name, value, step, seconds + 1) for name, value, step, seconds in make_outcome().metrics]
    assert record(make_outcome(metrics=later), work_dir, GATE) == made
    client = connect(embedded_uri(work_dir))
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted((run.data.tags["fot.key"], run.info.status) for run in runs) == [
        ("finetune-one", "FINISHED"),
        ("one", "FINISHED"),
    ]
    for name, count in (("perplexity/model", 2), ("passkey/exact", 2)):
        assert len(client.get_metric_history(made["run_id"], name)) == count
    assert len(client.search_model_versions("name = 'fot.tiny'")) == 1
    assert aliases(work_dir) == {"candidate": "1", "champion": "1"}


def test_evaluations_alone_become_a_run_without_a_model(work_dir: Path, make_outcome) -> None:
    made = record(make_outcome(model=None, trainings=[]), work_dir, GATE)
    assert (made["model"], made["version"], made["gate"]) == (None, None, None)
    client = connect(embedded_uri(work_dir))
    assert client.get_run(made["run_id"]).info.status == "FINISHED"
    assert list(client.search_registered_models()) == []
    assert register(make_outcome(model=None, trainings=[]), work_dir, GATE) == made


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter/weights.pt", "old.ckpt"])
def test_pickled_weights_are_refused(work_dir: Path, make_outcome, file: str) -> None:
    outcome = make_outcome()
    (outcome.model / file).parent.mkdir(exist_ok=True)
    (outcome.model / file).write_bytes(b"")
    with pytest.raises(UserError, match=f"{file} is pickled"):
        record(outcome, work_dir)
    (outcome.model / file).unlink()
    (outcome.model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors"):
        record(outcome, work_dir)


def test_values_longer_than_mlflow_takes_are_cut(work_dir: Path, make_outcome) -> None:
    made = record(make_outcome(tags={"fot.base": "x" * 9000}, params={"layers": "y" * 7000}), work_dir)
    run = connect(embedded_uri(work_dir)).get_run(made["run_id"])
    assert (len(run.data.tags["fot.base"]), len(run.data.params["layers"])) == (8000, 6000)


def test_what_is_recorded_is_left_alone_and_what_was_deleted_is_recorded_again(
    work_dir: Path, make_outcome, empty_database: Path
) -> None:
    made = register(make_outcome(), work_dir, GATE)
    assert made["gate"] == "promoted"
    client = connect(embedded_uri(work_dir))
    client.set_tag(made["run_id"], "mlflow.note.content", "by hand")
    assert register(make_outcome(), work_dir) == made
    assert client.get_run(made["run_id"]).data.tags["mlflow.note.content"] == "by hand"
    client.delete_model_version("fot.tiny", "1")
    made |= {"version": "2"}  # MLflow gives no number twice
    assert register(make_outcome(), work_dir, GATE) == made
    client.set_terminated(made["run_id"], "FAILED")
    assert register(make_outcome(), work_dir, GATE) == made
    assert client.get_run(made["run_id"]).info.status == "FINISHED"

    (work_dir / "mlflow.db").write_bytes(empty_database.read_bytes())
    again = register(make_outcome(), work_dir, GATE)
    assert again["run_id"] != made["run_id"]
    assert connect(embedded_uri(work_dir)).get_run(again["run_id"]).info.status == "FINISHED"


def test_a_lost_training_comes_back_with_its_outcome(work_dir: Path, make_outcome) -> None:
    record(make_outcome(), work_dir)
    client = connect(embedded_uri(work_dir))
    client.delete_run(find_run(client, "tiny", "finetune-one").info.run_id)
    assert find_run(client, "tiny", "finetune-one") is None
    made = register(make_outcome(), work_dir)
    again = find_run(client, "tiny", "finetune-one")
    assert again.data.tags["mlflow.parentRunId"] == made["run_id"]
    assert len(client.get_metric_history(again.info.run_id, "loss")) == 3


REGISTER = """
import pickle, sys
from jobs.registry.record import record
outcome, work_dir, registry = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True)
input()
record(outcome, work_dir, registry)
"""


@pytest.mark.slow
def test_two_processes_at_once_on_a_brand_new_directory_make_two_versions(work_dir: Path, make_outcome) -> None:
    """Nothing is there when both begin: neither database nor experiment nor model."""
    (work_dir / "mlflow.db").unlink()
    processes = []
    for key in ("one", "two"):
        told = work_dir.with_name(key)
        told.write_bytes(pickle.dumps((make_outcome(key), work_dir, GATE)))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, "-c", REGISTER, str(told)], **pipes))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    client = connect(embedded_uri(work_dir))
    versions = client.search_model_versions("name = 'fot.tiny'")
    assert sorted(str(version.version) for version in versions) == ["1", "2"]
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    keys = sorted(run.data.tags["fot.key"] for run in runs)
    assert keys == ["finetune-one", "finetune-two", "one", "two"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert aliases(work_dir) == {"candidate": "2", "champion": "2"}
    assert Outbox(work_dir).entries() == []


def test_the_same_content_is_one_version_that_is_judged_anew(work_dir: Path, make_outcome) -> None:
    first = record(make_outcome("one", content="abc"), work_dir)
    other = record(make_outcome("two", content="def"), work_dir)
    assert (first["version"], first["gate"], other["version"]) == ("1", "not promoted", "2")
    later = [("passkey/exact", 1.0, 2048, FINISHED + 1), ("passkey/exact", 1.0, 4096, FINISHED + 1)]
    again = register(make_outcome("three", content="abc", metrics=later), work_dir, GATE)
    assert (again["version"], again["gate"]) == ("1", "promoted")
    assert again["run_id"] != first["run_id"]
    client = connect(embedded_uri(work_dir))
    assert aliases(work_dir) == {"candidate": "1", "champion": "1"}
    tags = client.get_model_version("fot.tiny", "1").tags
    assert (tags["fot.gate"], tags["fot.passkey_90"], tags["fot.content"]) == ("promoted", "4096", "abc")
    assert "model" not in {file.path for file in client.list_artifacts(again["run_id"])}
    client.set_registered_model_alias("fot.tiny", "champion", "2")  # by hand
    assert register(make_outcome("three", content="abc", metrics=later), work_dir, GATE) == again
    assert register(make_outcome("one", content="abc"), work_dir) == first
    assert aliases(work_dir) == {"candidate": "1", "champion": "2"}


def test_a_deleted_experiment_comes_back(work_dir: Path, make_outcome) -> None:
    made = register(make_outcome(), work_dir, GATE)
    client = connect(embedded_uri(work_dir))
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    assert register(make_outcome(), work_dir, GATE) == made
    assert client.get_experiment_by_name("tiny").lifecycle_stage == "active"


def test_a_run_that_another_machine_made_at_the_same_moment_is_the_only_one(work_dir: Path, monkeypatch) -> None:
    client, create = connect(embedded_uri(work_dir)), MlflowClient.create_run
    others = []

    def both(self: MlflowClient, experiment: str, start_time=None, **told: object):
        others.append(create(self, experiment, start_time=1, **told))
        return create(self, experiment, start_time=2, **told)

    monkeypatch.setattr(MlflowClient, "create_run", both)
    run = open_run(client, work_dir, "tiny", "one", "tiny")
    assert run.info.run_id == others[0].info.run_id
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_trainings_belong_to_all_runs_that_share_them(work_dir: Path, make_outcome) -> None:
    one = make_outcome("one")
    first = record(one, work_dir)
    client = connect(embedded_uri(work_dir))
    before = find_run(client, "tiny", "finetune-one")
    assert (before.info.start_time, before.info.end_time) == (FINISHED * 1000, FINISHED * 1000 + 2000)
    second = record(make_outcome("two", name="variant", trainings=one.trainings), work_dir)
    after = find_run(client, "tiny", "finetune-one")
    for made in (first, second):
        found = children(client, client.get_run(made["run_id"]))
        assert [run.info.run_id for run in found] == [after.info.run_id]
    assert after.data.tags["mlflow.parentRunId"] == first["run_id"]
    assert (after.info.start_time, after.info.end_time) == (before.info.start_time, before.info.end_time)


def test_an_outcome_cut_short_in_one_job_and_completed_in_another_has_come_of_both(
    work_dir: Path, make_outcome, monkeypatch
) -> None:
    with monkeypatch.context() as here:
        here.setattr(MlflowClient, "log_artifacts", lambda *_: Path("/gone").read_text())
        record(make_outcome(tags={"fot.job": "tiny-1"}), work_dir)
    made = register(make_outcome(tags={"fot.job": "tiny-1-2"}), work_dir)
    assert connect(embedded_uri(work_dir)).get_run(made["run_id"]).data.tags["fot.job"] == "tiny-1 tiny-1-2"
