"""`fot schedule ...`: recipes that run by cron."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.cli.views.schedule import (
    history_header,
    history_rows,
    list_header,
    list_row,
    next_firing,
    perplexity_line,
    plot_perplexity,
)
from jobs.cluster.package import WORK_DIR, absolute, holds_credentials
from jobs.common.cron import check_cron
from jobs.common.terminal import print_table
from jobs.config.dictionary import load_dictionary
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.settings import read_overridden, validated
from jobs.config.variants import load_comparison
from jobs.schedule.history import history_of
from jobs.schedule.store import (
    RECIPE,
    RESERVED,
    SCHEDULES,
    Missed,
    Schedule,
    ScheduleSettings,
    find_schedule,
    now,
    read_schedule,
    remove,
    schedules,
    server_of,
)
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically
from pipelines.workflow.progress import say


@dataclass(frozen=True)
class ScheduleRequest:
    """What `fot schedule add` is asked."""

    recipe: Path
    cron: str
    name: str | None = None
    overrides: Sequence[str] = ()
    time_zone: str = "UTC"
    missed: Missed = "catch_up"
    retries: int = 2
    retry_minutes: float = 5.0


def add(request: ScheduleRequest) -> None:
    """Keep a recipe, with what was set, to be fired by cron. Raises UserError for whatever would not work."""
    check_cron(request.cron, request.time_zone)
    recipe = _one_recipe(request.recipe, request.overrides)
    content = read_overridden(request.recipe, request.overrides)
    content.setdefault(WORK_DIR, recipe.work_dir)
    content = absolute(content)
    if (key := holds_credentials(content)) is not None:
        raise UserError(
            f"recipe {request.recipe}: {key} holds credentials, which would lie in the schedule's files: leave them "
            f"out, and set them in the environment of `fot schedule serve`"
        )
    if not recipe.registry.promote:
        raise UserError(
            f"recipe {request.recipe}: without registry.promote no model becomes the champion that the next firing "
            f"goes on with: give conditions, as docs/registry.md says"
        )
    told = {
        "name": request.name or recipe.name,
        "cron": " ".join(request.cron.split()),
        "time_zone": request.time_zone,
        "missed": request.missed,
        "retries": request.retries,
        "retry_minutes": request.retry_minutes,
        "added": now(),
        "since": now(),
    }
    settings = validated(ScheduleSettings, told, "fot schedule add")
    schedule = Schedule(Path(content[WORK_DIR]).resolve() / SCHEDULES / settings.name, settings)
    if settings.name in RESERVED:
        raise UserError(f"--name {settings.name} is taken, by what lies beside the schedules: choose another")
    if read_schedule(schedule.directory) is not None:
        raise UserError(
            f"schedule {settings.name} is there already: give --name, or remove it first (fot schedule remove "
            f"{settings.name}{_where(content[WORK_DIR])})"
        )
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(schedule.directory / RECIPE, text.encode())
    schedule.write()  # last: with it the schedule is there
    _say_next(schedule)


def show_list(work_dir: Path) -> None:
    """Print a work_dir's schedules, and whether they are served."""
    found = schedules(work_dir, lambda error: say(str(error)))
    if not found:
        print(f"no schedules in {work_dir}: fot schedule add RECIPE --cron LINE")
        return
    served = server_of(work_dir) is not None
    print_table("", list_header, [list_row(schedule, history_of(schedule), served) for schedule in found])
    if not served:
        say(f"nothing fires by cron: fot schedule serve{_where(work_dir)}")


def pause(work_dir: Path, name: str) -> None:
    """Have a schedule fire no more by cron; a firing that runs goes on."""
    find_schedule(work_dir, name).changed(paused=True).write()
    print(f"{name} is paused")


def resume(work_dir: Path, name: str) -> None:
    """Have a paused schedule fire again. What passed while it was paused was not missed."""
    schedule = find_schedule(work_dir, name)
    if schedule.settings.paused:
        schedule = schedule.changed(paused=False, since=now())
        schedule.write()
    _say_next(schedule)


def remove_schedule(work_dir: Path, name: str) -> None:
    """Remove a schedule; its history stays aside, its models where they are."""
    target = remove(find_schedule(work_dir, name))
    print(f"{name} is removed; its recipe and history are in {target}, its models stay in the registry")


def run_now(work_dir: Path, name: str) -> None:
    """Fire a schedule here and now, be it paused or served. Raises UserError where a firing runs, or this one fails."""
    schedule = find_schedule(work_dir, name)
    from jobs.schedule.firing import fire

    firing = fire(schedule, "run-now")
    if firing.state == "failed":
        raise UserError(f"schedule {name}: {firing.reasons[0]}")
    print(f"{name}: {firing.state}" + (f", {firing.model}" if firing.model else ""))
    print(*(f"  {reason}" for reason in firing.reasons), sep="\n")


def show_history(work_dir: Path, name: str, plot: Path | None) -> None:
    """Print what a schedule has fired, the last at the bottom, and perplexity over time."""
    schedule = find_schedule(work_dir, name)
    history = history_of(schedule)
    if not history:
        print(f"{name} has not fired yet")
        return
    zone = schedule.settings.time_zone
    print_table(f"{name}, times in {zone}", history_header, history_rows(history, zone))
    if line := perplexity_line(history):
        print(line)
    if plot is not None:
        plot_perplexity(history, plot)
        print(f"plotted to {plot}")


def serve(work_dir: Path, port: int) -> None:
    """Fire schedules by cron, and show Prefect's pages, until Ctrl-C or SIGTERM."""
    from jobs.schedule.serve import serve as serve_all

    serve_all(work_dir.resolve(), port)


def _one_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Raises UserError for a recipe of another kind."""
    if load_dictionary(path, overrides) is not None:
        raise UserError(f"recipe {path} is of the dictionary task: a schedule runs recipes that train a model")
    if load_comparison(path, overrides) is not None:
        raise UserError(f"recipe {path} has variants: a schedule goes on with one model, give a recipe without them")
    return load_recipe(path, overrides)


def _say_next(schedule: Schedule) -> None:
    work_dir = schedule.directory.parents[1]
    print(f"{schedule.name} fires next at {next_firing(schedule)}")
    if server_of(work_dir) is None:
        say(f"once it is served: fot schedule serve{_where(work_dir)}")


def _where(work_dir: Path | str) -> str:
    """The option that names a work_dir other than the default."""
    path = Path(work_dir)
    return "" if path.resolve() == Path("runs").resolve() else f" --work-dir {os.path.relpath(path)}"
