"""`fot schedule`: recipes that run by cron."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import recipe_argument, set_option, work_dir_option

schedule_name = click.argument("name")


@click.group()
def schedule() -> None:
    """Run a recipe by cron on what is new, going on with its champion."""


@schedule.command("add")
@recipe_argument
@set_option
@click.option("--cron", required=True, metavar="LINE", help='Minute, hour, day, month, weekday: "0 2 * * *".')
@click.option("--name", metavar="NAME", help="The schedule's; by default the recipe's.")
@click.option("--time-zone", default="UTC", show_default=True, metavar="NAME", help="What --cron is read in.")
@click.option(
    "--missed",
    type=click.Choice(["catch_up", "skip"]),
    default="catch_up",
    show_default=True,
    help="Firings that nobody was there for: one for all of them, or none.",
)
@click.option("--retries", default=2, show_default=True, type=click.IntRange(0), help="Of a firing that failed.")
@click.option("--retry-minutes", default=5.0, show_default=True, type=click.FloatRange(0), help="Between them.")
def add_schedule(recipe: Path, overrides: tuple[str, ...], **request: Any) -> None:
    """Fire RECIPE by cron, from now on."""
    from jobs.cli.commands import schedule as commands

    commands.add(commands.ScheduleRequest(recipe=recipe, overrides=overrides, **request))


@schedule.command("list")
@work_dir_option
def list_schedules(work_dir: Path) -> None:
    """List schedules: when they fire next, what they came to last."""
    from jobs.cli.commands import schedule as commands

    commands.show_list(work_dir)


@schedule.command("pause")
@schedule_name
@work_dir_option
def pause_schedule(name: str, work_dir: Path) -> None:
    """Have NAME fire no more by cron."""
    from jobs.cli.commands import schedule as commands

    commands.pause(work_dir, name)


@schedule.command("resume")
@schedule_name
@work_dir_option
def resume_schedule(name: str, work_dir: Path) -> None:
    """Have NAME fire by cron again."""
    from jobs.cli.commands import schedule as commands

    commands.resume(work_dir, name)


@schedule.command("remove")
@schedule_name
@work_dir_option
def remove_schedule(name: str, work_dir: Path) -> None:
    """Remove NAME; its history is kept aside."""
    from jobs.cli.commands import schedule as commands

    commands.remove_schedule(work_dir, name)


@schedule.command("run-now")
@schedule_name
@work_dir_option
def run_now(name: str, work_dir: Path) -> None:
    """Fire NAME here and now."""
    from jobs.cli.commands import schedule as commands

    commands.run_now(work_dir, name)


@schedule.command("history")
@schedule_name
@work_dir_option
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw perplexity over time, as PNG.")
def show_history(name: str, work_dir: Path, plot: Path | None) -> None:
    """Show what NAME has fired, and perplexity over time."""
    from jobs.cli.commands import schedule as commands

    commands.show_history(work_dir, name, plot)


@schedule.command("serve")
@work_dir_option
@click.option("--port", default=4200, show_default=True, type=click.IntRange(1, 65535), help="Of Prefect's pages.")
def serve_schedules(work_dir: Path, port: int) -> None:
    """Fire schedules by cron and show Prefect's pages, until Ctrl-C or SIGTERM."""
    from jobs.cli.commands import schedule as commands

    commands.serve(work_dir, port)
