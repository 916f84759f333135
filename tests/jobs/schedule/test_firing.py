"""Firings: their history with a stand-in for the recipe's run, and whole ones."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from jobs.common.stop import StoppedError
from jobs.config.recipe import load_recipe
from jobs.config.training import Continued
from jobs.registry.server import connect, embedded_uri
from jobs.schedule import firing as module
from jobs.schedule.firing import FiringRunsError, fire, going_on
from jobs.schedule.history import history_of, read_history
from jobs.schedule.store import OWN_RAY, Schedule
from jobs.train.batches import NothingNewError
from jobs.workflow.workspace import Workspace
from pipelines.workflow.errors import UserError


@pytest.fixture
def ends_with(local_ray, monkeypatch) -> Callable:
    """Has the recipe's run raise something."""

    def set_error(error: BaseException) -> None:
        def run(workspace: Workspace, around: object) -> None:
            raise error

        monkeypatch.setattr(module, "make", run)

    return set_error


def test_what_fails_is_told_in_a_line_and_a_retry_is_its_next_attempt(schedule: Schedule, ends_with) -> None:
    ends_with(UserError("source words: there is nothing"))
    first = fire(schedule, "cron", datetime(2026, 11, 21, 2, tzinfo=UTC), firing="f1")
    again = fire(schedule, "cron", datetime(2026, 11, 21, 2, tzinfo=UTC), firing="f1")
    assert read_history(schedule.history) == [first, again]
    assert [(each.state, each.attempt, each.reasons) for each in (first, again)] == [
        ("failed", 1, ("source words: there is nothing",)),
        ("failed", 2, ("source words: there is nothing",)),
    ]
    assert first.ended is not None


def test_a_bug_is_a_line_and_its_traceback_in_the_log(schedule: Schedule, ends_with) -> None:
    ends_with(KeyError("nowhere"))
    assert fire(schedule, "run-now").reasons == (f"KeyError: 'nowhere' (see {schedule.directory / 'log'})",)
    assert "in run" in (schedule.directory / "log").read_text()


def test_nothing_new_is_skipped(schedule: Schedule, ends_with) -> None:
    ends_with(NothingNewError("continues: the sources have 3 training tokens that X has not read: add documents, or"))
    told = fire(schedule, "run-now")
    expected = ("skipped", ("too little is new: the sources have 3 training tokens that X has not read",))
    assert (told.state, told.reasons) == expected


@pytest.mark.parametrize("error", [StoppedError("stopped as asked"), KeyboardInterrupt()])
def test_an_interruption_is_told_and_goes_on(schedule: Schedule, ends_with, error: BaseException) -> None:
    ends_with(error)
    with pytest.raises(type(error)):
        fire(schedule, "run-now")
    assert [each.state for each in read_history(schedule.history)] == ["interrupted"]
    assert schedule.holder is None


def test_there_are_never_two_firings(schedule: Schedule) -> None:
    with schedule.lock(), pytest.raises(FiringRunsError, match="schedule nightly: a firing runs already, in process"):
        fire(schedule, "run-now")
    assert read_history(schedule.history) == []


def test_what_passed_while_an_earlier_one_ran_is_told(schedule: Schedule, ends_with) -> None:
    ends_with(UserError("no"))
    fire(schedule, "cron", datetime(2026, 11, 23, 2, tzinfo=UTC))
    told = [(each.state, each.scheduled.day) for each in read_history(schedule.history)]
    assert told == [("missed", 22), ("failed", 23)]


def test_a_firing_that_is_killed_is_interrupted_and_frees_the_schedule(schedule: Schedule) -> None:
    code = (
        "import os, sys; from pathlib import Path; from jobs.schedule import firing, store\n"
        "firing.going_on = lambda *_: os.kill(os.getpid(), 9)\n"
        "firing.fire(store.read_schedule(Path(sys.argv[1])), 'run-now')"
    )
    assert subprocess.run([sys.executable, "-c", code, schedule.directory]).returncode == -signal.SIGKILL
    assert [each.state for each in history_of(schedule)] == ["interrupted"]
    assert schedule.holder is None


def test_sigterm_is_handled_afterwards_as_before(schedule: Schedule, monkeypatch) -> None:
    def takes_sigterm(workspace: Workspace, around: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError("no")

    @contextmanager
    def ray_that_takes_sigterm(workspace: Workspace) -> Iterator[None]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield

    monkeypatch.setattr(Workspace, "with_ray", ray_that_takes_sigterm)
    monkeypatch.setattr(module, "make", takes_sigterm)
    before = signal.getsignal(signal.SIGTERM)
    fire(schedule, "run-now")
    assert signal.getsignal(signal.SIGTERM) is before


def test_credentials_in_an_error_reach_neither_history_nor_log(schedule: Schedule, ends_with) -> None:
    for error in (RuntimeError, UserError):
        ends_with(error("403 for s3://me:secret@host/x and https://b.s3/x?X-Amz-Signature=secret"))
        told = fire(schedule, "run-now")
        assert told.state == "failed"
        assert "403 for s3://host/x and https://b.s3/x" in told.reasons[0]
        assert read_history(schedule.history)[-1] == told
    for path in (schedule.history, schedule.directory / "log"):
        assert "secret" not in path.read_text()
    assert "RuntimeError" in (schedule.directory / "log").read_text()


def test_it_goes_on_with_what_the_alias_stands_for_now(schedule: Schedule, work_dir: Path) -> None:
    recipe = load_recipe(schedule.recipe)
    assert going_on(recipe, work_dir).continues is None  # it has no champion yet: it begins
    client = connect(embedded_uri(work_dir))
    run = client.create_run(client.create_experiment("tiny")).info.run_id
    client.create_registered_model("fot.tiny")
    for _ in range(2):
        client.create_model_version("fot.tiny", "x", run)
    assert going_on(recipe, work_dir).continues is None
    client.set_registered_model_alias("fot.tiny", "champion", "1")
    assert going_on(recipe, work_dir).continues == Continued(model="models:/fot/tiny/1")
    client.set_registered_model_alias("fot.tiny", "champion", "2")
    assert going_on(recipe, work_dir).continues.model == "models:/fot/tiny/2"
    assert going_on(recipe, work_dir, "models:/fot/tiny/1").continues.model == "models:/fot/tiny/1"

    own = recipe.model_copy(update={"continues": Continued(model="models:/fot/tiny@candidate", replay=0.5)})
    assert going_on(own, work_dir).continues is None
    client.set_registered_model_alias("fot.tiny", "candidate", "2")
    assert going_on(own, work_dir).continues == Continued(model="models:/fot/tiny/2", replay=0.5)
    other = recipe.model_copy(update={"continues": Continued(model="models:/fot/large@champion")})
    with pytest.raises(UserError, match="models:/fot/large: there is no such model"):
        going_on(other, work_dir)


@pytest.mark.slow
def test_firings_from_the_first_to_one_that_the_gate_refuses(
    schedule: Schedule, local_ray, recipe: dict, corpus: Path, tmp_path: Path, work_dir: Path
) -> None:
    lines = corpus.read_text().splitlines(keepends=True)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "first.jsonl").write_text("".join(lines[:12]))
    recipe["data"]["sources"][0]["path"] = str(texts)
    schedule.recipe.write_text(yaml.safe_dump(recipe))
    stages = []

    def around(stage: str, build: Callable) -> object:
        stages.append(stage)
        return build()

    first = fire(schedule, "run-now", around=around)
    assert (first.state, first.model, first.continued) == ("promoted", "models:/fot/tiny/1", None), first.reasons
    assert (first.documents, first.new_documents) == (12, 12)
    assert sorted(first.perplexity) == [16, 32, 64]
    assert {"shards", "finetune", "perplexity", "report"} <= set(stages)

    nothing = fire(schedule, "run-now")
    assert (nothing.state, nothing.reasons) == ("skipped", ("no new documents",))
    assert (nothing.documents, nothing.new_documents) == (12, 0)

    (texts / "second.jsonl").write_text("".join(lines[12:18]))
    second = fire(schedule, "run-now")
    assert (second.state, second.model) == ("promoted", "models:/fot/tiny/2"), second.reasons
    assert (second.continued, second.documents, second.new_documents) == ("models:/fot/tiny/1", 18, 6)

    recipe["registry"] = {"promote": [{"metric": "perplexity/model", "most": 1.0}]}
    schedule.recipe.write_text(yaml.safe_dump(recipe))
    (texts / "third.jsonl").write_text("".join(lines[18:]))
    third = fire(schedule, "run-now")
    assert (third.state, third.model, third.continued) == ("refused", "models:/fot/tiny/3", "models:/fot/tiny/2")
    assert third.reasons[0].startswith("fail: perplexity/model is")
    aliases = connect(embedded_uri(work_dir)).get_registered_model("fot.tiny").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"champion": "2", "candidate": "3"}

    again = fire(schedule, "run-now")  # what was refused is not made again
    assert (again.state, again.reasons) == ("skipped", ("no new documents: what came of them is known",))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_firing_on_a_cluster_of_several_nodes(schedule: Schedule, cluster, fot, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.ray_address)
    fired = fot("schedule", "run-now", "nightly")
    assert fired.returncode == 0, fired.stdout
    assert "nightly: promoted, models:/fot/tiny/1" in fired.stdout
    assert not (schedule.directory.parent / OWN_RAY).exists()  # whose turn it is matters on one machine alone
