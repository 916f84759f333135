"""The `fot` command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

import sys
from typing import Any

import click

from jobs.cli import data, jobs, models, recipes, registry, schedule
from jobs.common.errors import INTERRUPTED, STOPPED, USER_ERROR, user_message
from jobs.common.stop import StoppedError
from pipelines.workflow.environment import prepare_environment
from pipelines.workflow.visible import visible

OF_A_CLUSTER = ("submit", "jobs", "status", "logs", "stop", "resume")


class _Commands(click.Group):
    """Ctrl-C is a line and exit code 130, in whatever command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("fot: interrupted; what was done is kept", file=sys.stderr)
            sys.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fot", prog_name="fot")
@click.pass_context
def fot(context: click.Context) -> None:
    """Turn an existing LLaMA into one that reads far beyond its context (Focused Transformer)."""
    prepare_environment(own_ray=context.invoked_subcommand not in OF_A_CLUSTER)


for command in (
    recipes.run,
    recipes.plan,
    recipes.manifest,
    jobs.submit,
    jobs.jobs_,
    jobs.status,
    jobs.logs,
    jobs.stop,
    jobs.resume,
    models.evaluate,
    models.probe,
    models.export,
    data.data,
    registry.registry,
    schedule.schedule,
):
    fot.add_command(command)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, an interruption 130."""
    try:
        fot()
    except StoppedError as error:
        print(f"fot: {visible(str(error))}", file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"fot: {visible(message)}", file=sys.stderr)
        sys.exit(USER_ERROR)
