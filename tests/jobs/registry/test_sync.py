"""What cannot reach MLflow waits in the outbox, tells no secret, and is uploaded once."""

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fixtures.registry import DOWN, GATE, aliases
from mlflow.tracking import MlflowClient

from jobs.config.registry import Registry
from jobs.registry.outbox import Outbox
from jobs.registry.record import Outcome, record, register
from jobs.registry.server import connect, embedded_uri, find_run, tracking_uri
from jobs.registry.sync import sync
from jobs.registry.tracking import TrainingFacts, TrainingRun, training_entry
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import console


def synced(work_dir: Path, uri: str | None = None) -> tuple[list[str], str]:
    """The lines that `sync` gives, and its error, "" without."""
    lines: list[str] = []
    try:
        for line in sync(work_dir, uri):
            lines.append(line)
    except UserError as error:
        return lines, str(error)
    return lines, ""


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
