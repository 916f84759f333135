"""`fot registry`: what was run and what came of it."""

from pathlib import Path

import click

from jobs.cli.options import work_dir_option

uri_option = click.option("--uri", metavar="URI", help="A tracking server or database instead.")


@click.group()
def registry() -> None:
    """List, show and compare what was run; upload what waited for MLflow."""


@registry.command("list")
@click.option("--name", metavar="NAME", help="Of this experiment, which is a recipe's name.")
@click.option("--filter", "asked", metavar="TEXT", help='"metric passkey/exact@65536 >= 0.9", or as MLflow has them.')
@work_dir_option
@uri_option
def list_(name: str | None, asked: str | None, work_dir: Path, uri: str | None) -> None:
    """List runs, the newest first."""
    from jobs.cli.commands import registry as commands

    commands.show_list(work_dir, uri, name, asked)


@registry.command("show")
@click.argument("run")
@work_dir_option
@uri_option
def show_run(run: str, work_dir: Path, uri: str | None) -> None:
    """Show a RUN (how its id begins, or NAME[@ALIAS|/VERSION] of a model) and all that led to it."""
    from jobs.cli.commands import registry as commands

    commands.show_run(work_dir, uri, run)


@registry.command()
@click.argument("runs", nargs=-1, required=True)
@work_dir_option
@uri_option
def compare(runs: tuple[str, ...], work_dir: Path, uri: str | None) -> None:
    """Put RUNS side by side: settings that differ, metrics, curves."""
    from jobs.cli.commands import registry as commands

    commands.compare(work_dir, uri, runs)


@registry.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@work_dir_option
@uri_option
def ui(port: int, work_dir: Path, uri: str | None) -> None:
    """Open MLflow's pages, for this machine alone."""
    from jobs.cli.commands import registry as commands

    commands.open_pages(work_dir, uri, port)


@registry.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@work_dir_option
@uri_option
def sync(recipe: Path | None, work_dir: Path, uri: str | None) -> None:
    """Upload what MLflow could not be told, of RECIPE or of a work_dir."""
    from jobs.cli.commands import registry as commands

    if recipe is None:
        commands.sync_all(work_dir, uri)
    else:
        commands.sync_recipe(recipe, uri)
