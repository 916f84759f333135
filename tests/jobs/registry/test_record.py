"""Outcomes become runs and model versions once, through the gate, whatever is interrupted or down."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs.config.registry import Registry
from jobs.registry.outbox import Outbox
from jobs.registry.record import Outcome, record, register
from jobs.registry.runs import children
from jobs.registry.server import connect, embedded_uri, find_run, open_run, tracking_uri
from jobs.registry.sync import sync
from jobs.registry.tracking import TrainingFacts, TrainingRun, training_entry
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import console

GATE = Registry.model_validate({"promote": [{"metric": "passkey/exact", "at": 2048, "least": 0.9}]})
FINISHED = 1_700_000_000.0  # when the outcomes of `make_outcome` were measured
DOWN = Registry(tracking_uri="http://me:secret@127.0.0.1:9")


def aliases(work_dir: Path) -> dict:
    """As a server gives them; from a database they are numbers."""
    held = connect(embedded_uri(work_dir)).get_registered_model("fot.tiny").aliases
    return {alias: str(version) for alias, version in held.items()}


def synced(work_dir: Path, uri: str | None = None) -> tuple[list[str], str]:
    """The lines that `sync` gives, and its error, "" without."""
    lines: list[str] = []
    try:
        for line in sync(work_dir, uri):
            lines.append(line)
    except UserError as error:
        return lines, str(error)
    return lines, ""


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


def test_while_the_server_is_down_an_outcome_waits_and_nothing_tells_the_password(work_dir: Path, make_outcome) -> None:
    began = time.monotonic()
    with console.capture() as said:
        made = record(make_outcome(), work_dir, DOWN)
    assert time.monotonic() - began < 5
    assert made == {"run_id": None, "model": "fot.tiny", "version": None, "gate": None}
    assert said.get().startswith(
        "MLflow at http://127.0.0.1:9 cannot be used (Connection refused): the results of tiny"
    )
    assert said.get().count("\n") == 1
    assert register(make_outcome(), work_dir, DOWN) == made
    lines, error = synced(work_dir, DOWN.tracking_uri)
    assert lines == ["one.json stays: MLflow at http://127.0.0.1:9 cannot be used (Connection refused)"]
    assert error.endswith("could not be uploaded: one.json")
    kept = (work_dir / "outbox" / "one.json").read_text()
    assert "secret" not in said.get() + kept
    assert "/" not in json.loads(kept)["outcome"]["model"][0]  # relative: a work directory can be moved


def test_an_unwritable_database_and_a_moved_work_directory_lose_nothing(
    work_dir: Path, make_outcome, tmp_path: Path, empty_database: Path
) -> None:
    (work_dir / "mlflow.db").write_bytes(b"this is no database, but as long as the header of one" * 10)
    with console.capture() as said:
        assert record(make_outcome(), work_dir, GATE)["run_id"] is None
    assert "file is not a database" in said.get()
    moved = work_dir.rename(tmp_path / "moved")
    (moved / "mlflow.db").write_bytes(empty_database.read_bytes())
    assert len(list(sync(moved))) == 1
    assert aliases(moved) == {"candidate": "1", "champion": "1"}  # the gate came along
    assert Outbox(moved).entries() == []


def test_sync_goes_on_where_files_are_gone_and_says_what_to_do(work_dir: Path, make_outcome) -> None:
    outcomes = [make_outcome(key) for key in ("one", "two")]
    for outcome in outcomes:
        record(outcome, work_dir, DOWN)
    outbox, gone = Outbox(work_dir), work_dir / "store" / "finetune" / "gone"
    outbox.keep("gone", training_entry(work_dir, DOWN.tracking_uri, gone, "FINISHED"))
    report = outcomes[0].artifacts["report.html"]
    report.unlink()
    lines, error = synced(work_dir, embedded_uri(work_dir))
    remedy = f"is gone: run its recipe again, or delete {outbox.directory}"
    assert lines[0] == f"gone.json stays: {gone / 'training.json'} {remedy}/gone.json"
    assert lines[1] == f"one.json stays: {report} {remedy}/one.json"
    assert lines[2].startswith("tiny: run ")
    assert error == f"2 of the files in {outbox.directory} could not be uploaded: gone.json, one.json"
    assert [outbox.has(key) for key in ("one", "two", "gone")] == [True, False, True]


def test_a_damaged_entry_is_one_line(work_dir: Path) -> None:
    outbox = Outbox(work_dir)
    outbox.keep("half", training_entry(work_dir, DOWN.tracking_uri, work_dir, "FINISHED"))
    outbox.file("half").write_text(outbox.file("half").read_text()[:20])
    with pytest.raises(UserError, match=r"half\.json is damaged: delete it and run its recipe again"):
        list(sync(work_dir))


def test_outcomes_that_waited_take_no_alias_from_newer_ones(work_dir: Path, make_outcome) -> None:
    def at(key: str, day: int, **changes: object) -> Outcome:
        points = [("passkey/exact", 0.95, 2048, 86400.0 * day)]
        return make_outcome(key, metrics=points, **changes)

    waits = Registry.model_validate({**GATE.model_dump(), "tracking_uri": DOWN.tracking_uri})
    for key, day in (("a", 3), ("b", 1), ("c", 2)):
        record(at(key, day), work_dir, waits)
    record(at("new", 5), work_dir, GATE)
    assert aliases(work_dir) == {"candidate": "1", "champion": "1"}
    assert len(synced(work_dir, embedded_uri(work_dir))[0]) == 3
    client = connect(embedded_uri(work_dir))
    runs = {number: client.get_model_version("fot.tiny", number).run_id for number in ("1", "2", "3", "4")}
    keys = {number: client.get_run(run_id).data.tags["fot.key"] for number, run_id in runs.items()}
    assert keys == {"1": "new", "2": "b", "3": "c", "4": "a"}  # in the order of their time
    assert aliases(work_dir) == {"candidate": "1", "champion": "1"}
    record(at("newest", 6), work_dir, GATE)
    assert aliases(work_dir) == {"candidate": "5", "champion": "5"}


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


def test_sync_leaves_alone_what_another_process_did_meanwhile(work_dir: Path, make_outcome) -> None:
    outcome = make_outcome()
    output = outcome.trainings[0]
    first = work_dir / "store" / "finetune" / "first"
    first.mkdir()
    TrainingFacts("a", "tiny", "tiny: first", {}, {}, {}).write(first)
    outbox = Outbox(work_dir)
    outbox.keep("a", training_entry(work_dir, embedded_uri(work_dir), first, "FINISHED"))
    outbox.keep("finetune-one", training_entry(work_dir, embedded_uri(work_dir), output, "RUNNING"))
    lines = sync(work_dir)
    assert next(lines).startswith("training tiny: first: run ")
    record(outcome, work_dir)  # the training ended well, and its entry is gone
    assert list(lines) == []
    assert find_run(connect(embedded_uri(work_dir)), "tiny", "finetune-one").info.status == "FINISHED"


def test_entries_go_to_their_own_servers_with_the_credentials_that_are_known(
    work_dir: Path, make_outcome, monkeypatch
) -> None:
    there: list[str] = []
    monkeypatch.setattr("jobs.registry.sync._upload", lambda entry, work_dir, uri: there.append(uri) or entry["key"])
    for key, uri in (("one", "http://a:b@127.0.0.1:9"), ("two", "http://c:d@127.0.0.1:19"), ("three", None)):
        outbox, entry = Outbox(work_dir), training_entry(work_dir, uri or embedded_uri(work_dir), work_dir, "FINISHED")
        outbox.keep(key, entry)
    assert list(sync(work_dir, known=["http://a:b@127.0.0.1:9", "http://elsewhere"])) == ["one", "three", "two"]
    assert there == ["http://a:b@127.0.0.1:9", embedded_uri(work_dir), "http://127.0.0.1:19"]


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


def test_a_server_that_takes_questions_and_never_answers_is_down(work_dir: Path, make_outcome, monkeypatch) -> None:
    over = threading.Event()

    class Hangs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                over.wait()
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"  # as prepare_environment has it
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hangs)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    with console.capture() as said:
        made = record(make_outcome(), work_dir, Registry(tracking_uri=f"http://127.0.0.1:{server.server_port}"))
    assert made["run_id"] is None
    assert "cannot be used (timed out)" in said.get()
    assert time.monotonic() - began < 10
    over.set()
    server.shutdown()
    server.server_close()


def test_mlflow_prints_no_address_for_it_may_hold_a_password() -> None:
    """Where it prints one, it asks the server for the run's name first."""
    MlflowClient(DOWN.tracking_uri)._tracking_client._log_url("0123")


def test_a_token_with_a_line_break_is_not_told(work_dir: Path, make_outcome, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret\n")
    with console.capture() as said:
        record(make_outcome(), work_dir, Registry(tracking_uri="http://127.0.0.1:9"))
    assert "cannot be used (a token holds a line break: see MLFLOW_TRACKING_TOKEN)" in said.get()
    assert "secret" not in said.get()


def test_a_database_whose_driver_is_missing_is_down(work_dir: Path, make_outcome, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with socket.socket() as database, console.capture() as said:
        database.bind(("127.0.0.1", 0))
        database.listen()
        uri = f"postgresql://me:secret@127.0.0.1:{database.getsockname()[1]}/x"
        assert record(make_outcome(), work_dir, Registry(tracking_uri=uri))["run_id"] is None
    assert "cannot be used (psycopg2 is not installed)" in said.get()
    assert Outbox(work_dir).has("one")


def test_an_outcome_cut_short_in_one_job_and_completed_in_another_has_come_of_both(
    work_dir: Path, make_outcome, monkeypatch
) -> None:
    with monkeypatch.context() as here:
        here.setattr(MlflowClient, "log_artifacts", lambda *_: Path("/gone").read_text())
        record(make_outcome(tags={"fot.job": "tiny-1"}), work_dir)
    made = register(make_outcome(tags={"fot.job": "tiny-1-2"}), work_dir)
    assert connect(embedded_uri(work_dir)).get_run(made["run_id"]).data.tags["fot.job"] == "tiny-1 tiny-1-2"


@pytest.mark.slow
def test_a_server_down_at_first_then_up_then_killed_then_up_again_has_everything_once(
    work_dir: Path, make_outcome, tracking_server, monkeypatch
) -> None:
    monkeypatch.setattr("jobs.registry.tracking.RETRY", 0.0)
    registry = Registry.model_validate({"tracking_uri": tracking_server.uri, "promote": GATE.model_dump()["promote"]})
    uri = tracking_uri(work_dir, registry.tracking_uri)
    tracking_server.kill()
    with console.capture() as said:
        record(make_outcome("one"), work_dir, registry)
    assert "Connection refused" in said.get()

    tracking_server.start()
    lines = list(sync(work_dir))
    assert len(lines) == 1
    assert lines[0].endswith("version 1 of models:/fot/tiny, promoted")
    assert list(sync(work_dir)) == []

    output = work_dir / "store" / "finetune" / "live"
    output.mkdir(parents=True)
    metrics = output / "metrics.jsonl"

    def step(number: int) -> None:
        with open(metrics, "a") as file:
            file.write(json.dumps({"step": number, "loss": 1 / number, "time": 100.0 + number}) + "\n")

    facts = TrainingFacts("finetune-live", "tiny", "tiny: finetune", {}, {}, {})
    with console.capture() as said:
        run = TrainingRun(work_dir, uri, facts, output)
        for number in range(1, 10):
            step(number)
            if number == 5:
                tracking_server.kill()
            run.update(metrics)
        run.finish(metrics)
        second = make_outcome("two")
        second = make_outcome("two", trainings=[*second.trainings, output])
        record(second, work_dir, registry)
    assert len(said.get().splitlines()) == 3, said.get()  # lost, not brought at the end, outcome kept
    assert sorted(entry["key"] for entry in Outbox(work_dir).entries()) == ["finetune-live", "two"]

    tracking_server.start()
    assert [line.partition(":")[0] for line in sync(work_dir)] == ["training tiny", "tiny"]
    assert Outbox(work_dir).entries() == []
    client = connect(uri)
    live = find_run(client, "tiny", "finetune-live")
    history = client.get_metric_history(live.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(number, 1 / number) for number in range(1, 10)]
    assert live.data.tags["mlflow.parentRunId"] == find_run(client, "tiny", "two").info.run_id
    assert client.get_registered_model("fot.tiny").aliases == {"candidate": "2", "champion": "2"}
