"""One firing: the recipe on what is new in its sources, going on with the champion, behind the gate."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.common.errors import user_message
from jobs.common.stop import StoppedError, stopping_on_sigterm
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.train_spec import Start
from jobs.config.training import Continued
from jobs.registry.gate import decide, metrics_by_name
from jobs.registry.models import find_version, model_address
from jobs.registry.record import CHAMPION, PROMOTED, registered_name
from jobs.registry.server import TrackingDownError, connect, talking_to, tracking_uri
from jobs.schedule.history import (
    Firing,
    Trigger,
    append,
    history_of,
    last_made,
    missed,
    new_id,
    passed,
    read_history,
    told,
)
from jobs.schedule.store import Schedule, now
from jobs.train.batches import NothingNewError
from jobs.workflow.data_stages import SHARDS
from jobs.workflow.evaluation_stages import read_results
from jobs.workflow.outcome import metric_points
from jobs.workflow.run import MadeRecipe, make
from jobs.workflow.workspace import Workspace
from pipelines.batches.fresh import fresh_documents
from pipelines.tokens.shards import Manifest
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError
from pipelines.workflow.running import Around, as_it_is
from pipelines.workflow.store import Output

LOG = "log"  # what libraries print, and tracebacks
STOP = "stop"  # the file that asks a firing's training to end, beside its history
UNABLE = "an earlier one was not done yet, or this machine slept"
SAME = "no new documents: what came of them is known"


class FiringRunsError(UserError):
    """The schedule's lock is held by a firing."""


def fire(
    schedule: Schedule,
    trigger: Trigger,
    scheduled: datetime | None = None,
    around: Around = as_it_is,
    firing: str | None = None,
) -> Firing:
    """Fire a schedule in this process, with a Ray of its own where RAY_ADDRESS names none. `firing`: the id, by which a
    retry is known and goes on with the model that the first attempt went on with.

    Returns what is in the history then, be it a failure. Raises FiringRunsError where a firing runs, and what
    interrupts it.
    """
    with schedule.lock() as held:
        if not held:
            raise FiringRunsError(f"schedule {schedule.name}: a firing runs already, in process {schedule.holder}")
        history = history_of(schedule)
        attempts = [each for each in history if each.firing == firing]
        if trigger == "cron" and scheduled is not None and (times := passed(schedule.settings, history, scheduled)):
            append(schedule.history, missed(times, UNABLE))
        began = Firing(
            firing=firing or new_id(),
            attempt=len(attempts) + 1,
            trigger=trigger,
            scheduled=scheduled,
            began=now(),
        )
        return _Attempt(schedule, began, around).run()


class _Attempt:
    """An attempt at a firing, told to the history as it goes."""

    def __init__(self, schedule: Schedule, began: Firing, around: Around) -> None:
        self._schedule, self._around, self._told = schedule, around, began
        self._paths: dict[str, Path] = {}
        self._start: Start | None = None

    def run(self) -> Firing:
        earlier = read_history(self._schedule.history)
        self._tell()
        log = self._schedule.directory / LOG
        try:
            return self._make(earlier)
        except NothingNewError as error:
            self._count()
            why = str(error).partition("continues: ")[2].partition(": add documents")[0]
            none = "no new documents" if self._told.new_documents == 0 else f"too little is new: {why}"
            return self._end(state="skipped", reasons=(none,))
        except StoppedError as error:
            self._end(state="interrupted", reasons=(str(error),))
            raise
        except Exception as error:
            message = user_message(error)
            if message is None:
                with open(log, "a") as file:
                    file.write(hide_credentials("".join(traceback.format_exception(error))))
                message = f"{told(error)} (see {log})"
            return self._end(state="failed", reasons=(hide_credentials(message),))
        except BaseException:  # Ctrl-C, and what an engine ends a process with
            self._end(state="interrupted", reasons=("it was ended",))
            raise

    def _make(self, earlier: list[Firing]) -> Firing:
        schedule = self._schedule
        recipe = load_recipe(schedule.recipe)
        mine = (firing for firing in earlier if firing.firing == self._told.firing)
        recipe = going_on(
            recipe, Path(recipe.work_dir), next((each.continued for each in mine if each.continued), None)
        )
        if recipe.continues is not None:
            self._tell(continued=recipe.continues.model)
        workspace = Workspace(recipe, log=schedule.directory / LOG)
        self._start = workspace.start
        with _turn(schedule), _same_sigterm(), workspace.with_ray(), stopping_on_sigterm(schedule.directory / STOP):
            made = make(workspace, self._seen)
        return self._judge(recipe, made, last_made(earlier))

    def _seen(self, stage: str, build: Callable[[], Output]) -> Output:
        output = self._around(stage, build)
        self._paths[stage] = output.path
        return output

    def _judge(self, recipe: Recipe, made: MadeRecipe, last: Firing | None) -> Firing:
        """What came of it, from what the stages made and what MLflow says."""
        self._count()
        results = read_results(list(recipe.evaluation.tasks), made.paths)
        metrics = metrics_by_name(metric_points(results))
        decision, recorded = decide(recipe.registry.promote, metrics), made.recorded
        facts: dict[str, Any] = {
            "outcome": made.paths["report"].name,
            "perplexity": metrics.get("perplexity/model", {}),
            "run": recorded["run_id"],
        }
        if recorded["version"] is not None:
            facts["model"] = f"models:/fot/{recipe.name}/{recorded['version']}"
        if last is not None and last.outcome == facts["outcome"]:
            return self._end(state="skipped", reasons=(SAME,))
        reasons = decision.reasons
        if recorded["gate"] is None:
            reasons = ("MLflow was down: `fot registry sync` tells it", *reasons)
        promoted = decision.promote if recorded["gate"] is None else recorded["gate"] == PROMOTED
        return self._end(state="promoted" if promoted else "refused", reasons=reasons, **facts)

    def _count(self) -> None:
        """How many documents there are, and how many of them the model that is continued has not read."""
        if (shards := self._paths.get(SHARDS)) is None:
            return
        manifest = Manifest.read(shards)
        documents = manifest.documents
        new = documents if self._start is None else int(fresh_documents(shards, self._start.data).sum())
        counts = {"documents": documents, "new_documents": new, "tokens": manifest.tokens}
        self._told = self._told.changed(manifest=manifest.hash, **counts)

    def _tell(self, **facts: object) -> None:
        self._told = self._told.changed(**facts)
        append(self._schedule.history, self._told)

    def _end(self, **facts: object) -> Firing:
        self._tell(ended=now(), **facts)
        return self._told


def going_on(recipe: Recipe, work_dir: Path, version: str | None = None) -> Recipe:
    """The recipe with what it goes on with, as a version: that of an earlier attempt, or what the alias of its own
    `continues` (without one, its champion) stands for now. Where its own model has no such alias yet, it begins.

    Raises UserError where another model that it continues is not there, TrackingDownError where MLflow is not.
    """
    continued = recipe.continues or Continued(model=f"models:/fot/{recipe.name}@{CHAMPION}")
    if version is None:
        address = model_address(continued.model)
        uri = tracking_uri(work_dir, recipe.registry.tracking_uri)
        client = connect(uri)
        try:
            with talking_to(uri):
                version = f"{address.shown}/{find_version(client, address).version}"
        except TrackingDownError:
            raise
        except UserError:
            if address.name == registered_name(recipe.name) and address.alias is not None:
                return recipe.model_copy(update={"continues": None})
            raise
    return recipe.model_copy(update={"continues": continued.model_copy(update={"model": version})})


@contextmanager
def _turn(schedule: Schedule) -> Iterator[None]:
    """One firing of a work_dir at a time on a Ray of this machine's own; a cluster shares itself out."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        yield
        return
    with schedule.own_ray():
        yield


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and keeps it when it has ended."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
