"""`fot registry` in the terminal."""

import json
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli.fot import fot
from jobs.common.errors import user_message
from jobs.config.registry import Registry
from jobs.registry.record import record, register
from jobs.registry.server import embedded_uri
from jobs.registry.tracking import TrainingFacts, upload_training

GATE = Registry.model_validate({"promote": [{"metric": "passkey/exact", "at": 2048, "least": 0.9}]})


@pytest.fixture
def run_fot(work_dir: Path):
    """Runs `fot registry ...` on the work directory. Returns exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(fot, ["registry", *arguments, "--work-dir", str(work_dir)])
        message = None if done.exception is None else user_message(done.exception)
        return (2, message) if message is not None else (done.exit_code, done.output)

    return run


@pytest.fixture
def three_runs(work_dir: Path, make_outcome) -> list[dict]:
    """Two versions of a model, of which the first is champion, and an evaluation; each with its lineage."""
    report = work_dir / "store" / "report"
    report.mkdir(parents=True)
    tokens = {"entries": [["a.txt", [["a.txt", "0123456789abcdef0000"]]]], "source": "books"}
    stages = {
        "shards": {"key": "5aa5", "inputs": {"tokenizer": "70c0"}, "params": {}, "files": {"manifest.json": []}},
        "base": {"key": "ba5e", "inputs": {}, "params": {"path": "/models/llama"}, "files": {"base.json": []}},
        "perplexity": {"key": "99e1", "inputs": {"finetune": "f17e"}, "params": {}, "files": {"result.json": []}},
        "finetune": {"key": "f17e", "inputs": {"shards": "5aa5", "base": "ba5e"}, "params": {}, "files": {"m": []}},
    }
    (report / "lineage.json").write_text(json.dumps(stages))
    (report / "recipe.json").write_text(json.dumps({"data": {"sources": [{"name": "books", "path": "/corpus/*.txt"}]}}))
    (report / "manifest.json").write_text(json.dumps({"shards": [{"unit": tokens}]}))
    artifacts = {name: report / name for name in ("lineage.json", "recipe.json", "manifest.json")}
    return [
        record(make_outcome("one", artifacts=artifacts), work_dir, GATE),
        record(make_outcome("two", passkey=0.5, params={"seed": 1, "steps": 3}), work_dir, GATE),
        record(make_outcome("three", name="other", model=None, trainings=[]), work_dir),
    ]


def test_runs_are_listed_newest_first_with_their_models(run_fot, three_runs: list[dict]) -> None:
    code, printed = run_fot("list")
    assert code == 0
    header, *lines = printed.splitlines()
    assert header.split() == ["run", "experiment", "name", "kind", "status", "start", "last", "metrics", "model"]
    assert len(lines) == 5  # with two trainings
    assert lines[0].startswith(three_runs[2]["run_id"][:8])
    one = next(line for line in lines if line.startswith(three_runs[0]["run_id"][:8]))
    assert "perplexity/model 9.5 at 2048, passkey/exact 0.95 at 2048" in one
    assert "fot/tiny 1 (champion)" in one
    assert any("fot/tiny 2 (candidate)" in line for line in lines)
    assert sum(" training " in line for line in lines) == 2

    assert len(run_fot("list", "--name", "other")[1].splitlines()) == 2
    for asked, count in {
        "metric passkey/exact@2048 >= 0.9": 2,
        "metric passkey/exact@2048 < 0.9": 1,
        "metric passkey/exact@512 < 0.9": 0,
        "metric passkey/exact < 0.9": 1,
        "metric passkey/exact <.9": 1,
        "metric passkey/exact != 9.5e-1": 1,
        "metric passkey/exact < 1E+5": 3,
        "params.seed = '1'": 1,
        "tags.`fot.kind` = 'training'": 2,
    }.items():
        code, printed = run_fot("list", "--filter", asked)
        assert (code, len(printed.splitlines()) - 1) == (0, count), asked
    assert run_fot("list", "--filter", "metric passkey/exact@4 >= 0")[1] == "no runs\n"


def test_a_run_is_shown_by_id_and_by_model_with_gate_and_lineage(run_fot, three_runs: list[dict]) -> None:
    code, printed = run_fot("show", three_runs[0]["run_id"][:10])
    assert code == 0
    for asked in ("tiny@champion", "models:/fot/tiny/1", three_runs[0]["run_id"]):
        assert run_fot("show", asked) == (0, printed)
    assert "loss of tiny: finetune: █▅▁ 3 to 1, 1 to 3" in printed
    assert ["passkey/exact", "2048", "0.95"] in [line.split() for line in printed.splitlines()]
    assert "gate: promoted\n  pass: passkey/exact at 2048 is 0.95, wanted at least 0.9\n" in printed
    lineage = printed[printed.index("lineage") :].splitlines()
    assert lineage[1:-1] == [
        "  source books: /corpus/*.txt, 1 files",
        "    a.txt  0123456789abcdef",
        "  shards 5aa5: 1 files; of tokenizer 70c0",
        "  base ba5e from /models/llama: 1 files",
        "  finetune f17e: 1 files; of shards 5aa5, base ba5e",
        "  perplexity 99e1: 1 files; of finetune f17e",
    ]
    assert lineage[-1].endswith(": tiny: finetune, finished")
    assert "gate: not promoted" in run_fot("show", "tiny@candidate")[1]


def test_a_run_is_shown_by_the_job_that_made_it(run_fot, work_dir: Path, make_outcome) -> None:
    for key in ("one", "two", "three"):
        job = {} if key == "three" else {"fot.job": "tiny-43ea7c57"}
        made = record(make_outcome(key, tags=job), work_dir)
        if key == "two":
            wanted = str(made["run_id"])
    code, printed = run_fot("show", "tiny-43ea7c57")
    assert code == 0
    assert printed.startswith(f"tiny: recipe {wanted}")
    assert ["fot.job", "tiny-43ea7c57"] in [line.split() for line in printed.splitlines()]
    register(make_outcome("two", tags={"fot.job": "tiny-43ea7c57-2"}), work_dir)  # everything was there
    code, printed = run_fot("show", "tiny-43ea7c57-2")
    assert (code, printed.startswith(f"tiny: recipe {wanted}")) == (0, True)
    assert ["fot.job", "tiny-43ea7c57", "tiny-43ea7c57-2"] in [line.split() for line in printed.splitlines()]
    assert run_fot("show", "tiny-43ea7c57")[1].startswith(f"tiny: recipe {wanted}")


def test_a_job_that_came_to_no_end_is_shown_by_its_last_training(run_fot, work_dir: Path, make_outcome) -> None:
    trained = make_outcome("one").trainings[0]
    for key, job, began in (("first", "tiny-43ea7c57", 1.0), ("last", "tiny-43ea7c57", 2.0), ("other", "else", 3.0)):
        (trained / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.0, "time": {began}}}\n')
        (trained / "training.json").unlink()
        TrainingFacts(key, "tiny", f"tiny: {key}", {"fot.job": job}, {}, {}).write(trained)
        upload_training(work_dir, embedded_uri(work_dir), trained, "FAILED")
    assert run_fot("show", "tiny-43ea7c57")[1].startswith("tiny: last: training ")
    made = record(make_outcome("two", tags={"fot.job": "tiny-43ea7c57"}), work_dir)
    assert run_fot("show", "tiny-43ea7c57")[1].startswith(f"tiny: recipe {made['run_id']}")
    for job in ("tiny-43ea7c58", "tiny-43ea7c57-2"):
        assert run_fot("show", job) == (2, f"no run of job {job} yet: `fot status {job}` says how far it is")
    assert "there is no such model" in run_fot("show", "tiny-43ea7c5")[1]


def test_runs_are_compared_by_what_differs(run_fot, three_runs: list[dict]) -> None:
    code, printed = run_fot("compare", "tiny/1", "tiny/2")
    assert code == 0
    rows = [line.split() for line in printed.splitlines()]
    assert ["seed", "0", "1"] in rows
    assert not any(row[0] == "steps" for row in rows)
    assert ["passkey/exact", "2048", "0.95", "0.5", "(-0.45)"] in rows
    assert printed.count("training loss  █▅▁ 3 to 1") == 2
    assert "perplexity     █▁ 10.05 to 9.5, 512 to 2048" in printed


def test_what_there_is_not_is_one_line(run_fot, work_dir: Path, three_runs: list[dict]) -> None:
    for arguments, message in (
        (("show", "abcdef01"), "abcdef01 is no run's id, nor a model: `fot registry list` shows what there is"),
        (("show", "tinny"), "models:/fot/tinny: there is no such model, but fot/tiny"),
        (("show", "tiny@best"), "models:/fot/tiny has no alias best: there are versions 1, 2"),
        (("compare", "tiny"), "give two runs or more"),
        (("list", "--name", "tinny"), "--name tinny: there is no such experiment, but "),
        (("list", "--filter", "metric x is large"), 'write it as "metric passkey/exact@65536 >= 0.9"'),
        (("list", "--filter", "no filter"), "--filter no filter: Invalid"),
        (("show", "abc"), "abc is no model, and too short for a run's id: give four characters"),
        (("list", "--uri", f"sqlite:///{work_dir}/other.db"), f"there is no database {work_dir}/other.db: give "),
        (("ui", "--uri", f"sqlite:///{work_dir}/other.db"), f"there is no database {work_dir}/other.db: give "),
        (("list", "--uri", "ftp://me:secret@host"), "--uri: ftp://host is no tracking server"),
        (("list", "--uri", "http://me:secret@127.0.0.1:9"), "MLflow at http://127.0.0.1:9 cannot be used"),
    ):
        code, said = run_fot(*arguments)
        assert code == 2
        assert message in said
        assert "secret" not in said
        assert "\n" not in said
    assert not (work_dir / "other.db").exists()


def test_a_directory_without_runs_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(fot, ["registry", "list", "--work-dir", str(tmp_path)])
    assert f"{tmp_path} holds no runs: give --work-dir DIR" in user_message(done.exception)
    assert not (tmp_path / "mlflow.db").exists()


def test_sync_says_what_it_did(run_fot, work_dir: Path, make_outcome) -> None:
    assert run_fot("sync") == (0, f"nothing waits in {work_dir / 'outbox'}\n")
    record(make_outcome(), work_dir, Registry(tracking_uri="http://127.0.0.1:9"))
    said = f"1 of the files in {work_dir}/outbox could not be uploaded: one.json"
    assert run_fot("sync") == (2, said)
    entry = work_dir / "outbox" / "one.json"
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "uri": None}))
    code, printed = run_fot("sync")
    assert code == 0
    assert printed.startswith("tiny: run ")
    assert printed.endswith(", version 1 of models:/fot/tiny, not promoted\n")
    assert not entry.exists()
    record(make_outcome("two"), work_dir, Registry(tracking_uri="http://127.0.0.1:9"))
    assert run_fot("sync", "--uri", "ftp://host")[1].startswith("--uri: ftp://host is no tracking server")
    assert run_fot("sync", "--uri", f"sqlite:///{work_dir}/mlflow.db")[0] == 0
    assert not (work_dir / "outbox" / "two.json").exists()


@pytest.mark.parametrize(
    "kind", [{"kind": "dictionary"}, {"variants": {"a": {"set": {"seed": 1}}}}, {"finetune": {"steps": "many"}}]
)
def test_a_recipe_of_any_kind_says_where_to_sync_and_with_what_credentials(
    kind: dict, work_dir: Path, make_outcome, tmp_path: Path, monkeypatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr("jobs.registry.sync._upload", lambda entry, work_dir, uri: used.append(uri) or "done")
    theirs, mine = "http://me:secret@127.0.0.1:9", "http://you:secret@127.0.0.1:19"
    for key, uri in (("one", theirs), ("two", mine), ("three", "http://127.0.0.1:29")):
        record(make_outcome(key), work_dir, Registry(tracking_uri=uri))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"work_dir": str(work_dir), "registry": {"tracking_uri": theirs}, **kind}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine)
    done = CliRunner().invoke(fot, ["registry", "sync", str(recipe)])
    assert (done.exit_code, done.output) == (0, "done\n" * 3)
    assert sorted(used) == sorted([theirs, mine, "http://127.0.0.1:29"])


def test_a_directory_that_is_not_there_is_not_synced(tmp_path: Path) -> None:
    done = CliRunner().invoke(fot, ["registry", "sync", "--work-dir", str(tmp_path / "rnus")])
    assert f"{tmp_path}/rnus: there is no such directory: give --work-dir DIR" in user_message(done.exception)
    assert not (tmp_path / "rnus").exists()


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        (("list",), "show_list"),
        (("show", "a"), "show_run"),
        (("compare", "a", "b"), "compare"),
        (("ui",), "open_pages"),
    ],
)
def test_an_interruption_ends_reading_with_its_exit_code(run_fot, monkeypatch, arguments: tuple, called: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"jobs.cli.commands.registry.{called}", interrupted)
    assert run_fot(*arguments)[0] == 130


def test_pages_that_do_not_start_say_why_without_credentials(
    run_fot, work_dir: Path, tmp_path: Path, port: int, monkeypatch
) -> None:
    server = tmp_path / "python"
    server.write_text("#!/bin/sh\necho 'no answer from postgresql://me:secret@host/x?password=secret'\n")
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    code, said = run_fot("ui", "--port", str(port))
    assert code == 2
    assert f"do not start on port {port} (no answer from postgresql://host/x): try" in said


def test_a_port_that_is_taken_is_one_line(run_fot) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = f"port {port} is taken, by other pages perhaps: try --port with another one"
        assert run_fot("ui", "--port", str(port)) == (2, said)
