"""`fot schedule ...` as a user types it."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from jobs.schedule.store import Schedule, find_schedule

PROMOTE = {"promote": [{"metric": "perplexity/model", "most": 1e6}]}


@pytest.fixture
def add(fot_here, recipe: dict, write_recipe, work_dir: Path):
    """Adds the tiny recipe, with changes, at 2 every night."""

    def run(*options: object, **changes: object):
        path = write_recipe(recipe | {"registry": PROMOTE} | changes)
        return fot_here("schedule", "add", path, *(options or ("--cron", "0 2 * * *")))

    return run


def test_a_schedule_is_added_listed_paused_resumed_and_removed(add, fot_here, work_dir: Path, tmp_path: Path) -> None:
    added = add("--cron", "0  2 * * *", "--time-zone", "Europe/Berlin", "--name", "nightly", "--missed", "skip")
    assert added.returncode == 0, added.stdout
    assert "nightly fires next at " in added.stdout
    settings = find_schedule(work_dir, "nightly").settings
    assert (settings.cron, settings.time_zone, settings.missed) == ("0 2 * * *", "Europe/Berlin", "skip")
    assert (settings.retries, settings.retry_minutes, settings.paused) == (2, 5.0, False)

    listed = fot_here("schedule", "list").stdout
    assert "nightly" in listed
    assert "not served" in listed
    assert "fot schedule serve" in listed
    assert fot_here("schedule", "pause", "nightly").returncode == 0
    assert "paused" in fot_here("schedule", "list").stdout
    paused = find_schedule(work_dir, "nightly")
    assert paused.settings.paused
    paused.changed(since=paused.settings.since - timedelta(days=1)).write()
    assert fot_here("schedule", "resume", "nightly").returncode == 0
    resumed = find_schedule(work_dir, "nightly").settings
    assert (resumed.paused, resumed.since >= paused.settings.since) == (False, True)
    assert "nightly has not fired yet" in fot_here("schedule", "history", "nightly").stdout

    removed = fot_here("schedule", "remove", "nightly")
    assert "its models stay in the registry" in removed.stdout
    assert "no schedules in runs" in fot_here("schedule", "list").stdout
    assert fot_here("schedule", "remove", "nightly").returncode == 2


def test_the_recipe_is_kept_with_what_was_set_and_absolute_paths(add, recipe: dict, work_dir: Path) -> None:
    recipe["data"]["sources"][0]["path"] = "corpus.jsonl"
    assert add("--cron", "0 2 * * *", "--set", "finetune.steps=9").returncode == 0
    kept = yaml.safe_load(find_schedule(work_dir, "tiny").recipe.read_text())
    assert kept["finetune"]["steps"] == 9
    assert kept["data"]["sources"][0]["path"] == str(work_dir.parent / "corpus.jsonl")
    assert kept["work_dir"] == str(work_dir)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--cron", "0 0 30 2 *"), {}, "--cron '0 0 30 2 *' never fires"),
        (("--cron", "0 2 * * *", "--time-zone", "Mars"), {}, "--time-zone Mars: no such time zone"),
        ((), {"registry": {}}, "without registry.promote no model becomes the champion"),
        ((), {"finetune": {}}, "recipe "),
        (("--cron", "0 2 * * *", "--name", "removed"), {}, "--name removed is taken"),
        (("--cron", "0 2 * * *", "--name", "serve.lock"), {}, "--name serve.lock is taken"),
        (("--cron", "0 2 * * *", "--name", "../x"), {}, "name"),
        (("--cron", "0 2 * * *", "--set", "finetune.stepz=1"), {}, "finetune.stepz"),
        ((), {"variants": {"a": {}}}, "has variants: a schedule goes on with one model"),
        (
            (),
            {"registry": PROMOTE | {"tracking_uri": "http://me:secret@host:1"}},
            "registry.tracking_uri holds credentials, which would lie in the schedule's files",
        ),
    ],
)
def test_what_would_not_work_is_refused_in_one_line(add, work_dir: Path, options, changes: dict, message: str) -> None:
    refused = add(*options, **changes)
    assert refused.returncode == 2
    assert message in refused.stdout
    assert "secret" not in refused.stdout
    assert len(refused.stdout.strip().splitlines()) == 1
    assert not list((work_dir / "schedules").glob("*/schedule.json"))


def test_a_name_that_is_there_is_refused(add) -> None:
    assert add().returncode == 0
    again = add()
    assert again.returncode == 2
    assert "schedule tiny is there already: give --name, or remove it first (fot schedule remove tiny)" in again.stdout


def test_a_dictionary_recipe_is_refused(fot_here, write_recipe) -> None:
    refused = fot_here("schedule", "add", write_recipe({"kind": "dictionary"}), "--cron", "0 2 * * *")
    assert refused.returncode == 2


def test_firing_beside_a_firing_is_one_line(schedule: Schedule, fot_here) -> None:
    with schedule.lock():
        refused = fot_here("schedule", "run-now", "nightly")
    assert refused.returncode == 2
    assert refused.stdout.startswith("fot: schedule nightly: a firing runs already, in process ")


def test_a_firing_that_fails_is_one_line_and_in_the_history(schedule: Schedule, fot_here, recipe: dict) -> None:
    recipe["data"]["sources"][0]["path"] = "/nowhere"
    schedule.recipe.write_text(yaml.safe_dump(recipe))
    failed = fot_here("schedule", "run-now", "nightly")
    assert failed.returncode == 2
    assert "fot: schedule nightly: " in failed.stdout
    assert "/nowhere" in failed.stdout
    history = fot_here("schedule", "history", "nightly").stdout
    assert "failed" in history
    assert "/nowhere" in history
    assert "failed" in fot_here("schedule", "list").stdout


def test_the_commands_load_neither_torch_nor_mlflow() -> None:
    code = "import sys, jobs.cli.commands.schedule; print({'torch', 'mlflow', 'ray', 'prefect'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
