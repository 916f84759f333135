"""Jobs of a cluster: `fot submit`, `fot jobs`, `fot status`, `fot logs`, `fot stop`, `fot resume`."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import recipe_argument, set_option

address_option = click.option("--address", metavar="URL", help="The cluster's dashboard: http://HOST:8265.")
follow_option = click.option("-f", "--follow", "log", is_flag=True, help="Print what it prints until it has ended.")
wait_option = click.option("--wait", is_flag=True, help="Wait until it has ended.")
job_argument = click.argument("job")


@click.command()
@click.argument("recipe_or_job")
@set_option
@address_option
def status(recipe_or_job: str, overrides: tuple[str, ...], address: str | None) -> None:
    """Show the stages of a recipe or of a job: state, duration, output."""
    if Path(recipe_or_job).exists() or recipe_or_job.endswith((".yaml", ".yml")):
        from jobs.workflow.run import show_status

        show_status(Path(recipe_or_job), overrides)
    else:
        from jobs.cli.commands import cluster as commands

        commands.show_job(recipe_or_job, address)


@click.command()
@recipe_argument
@set_option
@address_option
@click.option("--name", metavar="NAME", help="The job's; by default the recipe's.")
@click.option("--owner", metavar="NAME", help="Whose job it is; by default who you are here.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="For finding it again (repeat).")
@follow_option
@wait_option
def submit(recipe: Path, overrides: tuple[str, ...], **request: Any) -> None:
    """Run a recipe on a Ray cluster, which needs nobody to watch it."""
    from jobs.cli.commands import cluster as commands

    commands.submit(commands.SubmitRequest(recipe=recipe, overrides=overrides, **request))


@click.command("jobs")
@address_option
@click.option("--owner", metavar="NAME")
@click.option("--name", metavar="NAME")
def jobs_(address: str | None, owner: str | None, name: str | None) -> None:
    """List a cluster's jobs, the newest first."""
    from jobs.cli.commands import cluster as commands

    commands.show_jobs(address, owner, name)


@click.command()
@job_argument
@address_option
@follow_option
def logs(job: str, address: str | None, log: bool) -> None:
    """Print what a JOB has printed."""
    from jobs.cli.commands import cluster as commands

    commands.show_log(job, address, log)


@click.command()
@job_argument
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a JOB, a training after a checkpoint."""
    from jobs.cli.commands import cluster as commands

    commands.stop(job, address)


@click.command()
@job_argument
@address_option
@follow_option
@wait_option
def resume(job: str, address: str | None, log: bool, wait: bool) -> None:
    """Run a JOB again; it goes on from where it is."""
    from jobs.cli.commands import cluster as commands

    commands.resume(job, address, log, wait)
