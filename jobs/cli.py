"""The `fot` command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from pipelines.environment import prepare_environment
from pipelines.errors import UserError

DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
    "PytorchStreamWriter failed",
    "unexpected pos",
)
INTERRUPTED = 130
USER_ERROR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fot", prog_name="fot")
def fot() -> None:
    """Turn an existing LLaMA into one that reads far beyond its context (Focused Transformer)."""
    prepare_environment()


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe: finetune.steps=200."
)


@contextmanager
def goes_on_later() -> Iterator[None]:
    """Ctrl-C in the block is one line, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("fot: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


@fot.command()
@recipe_argument
@set_option
def run(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Run a recipe from corpus to registered model. Finished stages are not run again."""
    with goes_on_later():
        from jobs.run import run_recipe

        run_recipe(recipe, overrides)


@fot.command()
@recipe_argument
@set_option
def status(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show a recipe's stages: state, duration, output."""
    from jobs.run import show_status

    show_status(recipe, overrides)


@fot.command()
@recipe_argument
@set_option
@click.option("--device", default="H100", show_default=True, metavar="NAME", help="The GPU that each worker has.")
@click.option(
    "--mfu",
    default=0.4,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of its peak that the training reaches.",
)
def plan(recipe: Path, overrides: tuple[str, ...], device: str, mfu: float) -> None:
    """Say what a recipe's trainings take: memory, FLOPs, hours. Needs no data and no weights."""
    from jobs.plan import show_plan

    show_plan(recipe, overrides, device, mfu)


@fot.command()
@click.argument("checkpoint")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; by default what was trained in.")
def export(checkpoint: str, directory: Path, dtype: str | None) -> None:
    """Write a training's CHECKPOINT (path or URL) as a Hugging Face DIRECTORY."""
    from jobs.train.export import export_checkpoint

    export_checkpoint(checkpoint, directory, dtype)
    print(f"exported to {directory}")


@fot.group()
def data() -> None:
    """Make, check, mend and look at a recipe's data."""


training_option = click.option(
    "--training",
    default="finetune",
    show_default=True,
    metavar="NAME",
    help="finetune, or base where it is pre-trained.",
)


@data.command()
@recipe_argument
@set_option
def prepare(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Tokenize and pack what is new in the sources; train nothing."""
    with goes_on_later():
        from jobs.data import commands

        commands.prepare(recipe, overrides)


@data.command()
@recipe_argument
@set_option
def verify(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Compare all files with their checksums and counts."""
    from jobs.data import commands

    commands.verify(recipe, overrides)


@data.command()
@recipe_argument
@set_option
def repair(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make damaged or missing files again from the sources, the same to the byte."""
    with goes_on_later():
        from jobs.data import commands

        commands.repair(recipe, overrides)


@data.command()
@recipe_argument
@set_option
@training_option
@click.option("--step", required=True, type=click.IntRange(min=0), help="Which step, from 0.")
def show(recipe: Path, overrides: tuple[str, ...], training: str, step: int) -> None:
    """Print a step's batch: its documents, and which serve which as negatives."""
    from jobs.data import commands

    commands.show(recipe, overrides, step, training)


@data.command()
@recipe_argument
@set_option
@training_option
def inspect(recipe: Path, overrides: tuple[str, ...], training: str) -> None:
    """Print sources, document lengths, epochs, samples and the plan."""
    from jobs.data import commands

    commands.inspect(recipe, overrides, training)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, an interruption 130."""
    try:
        fot()
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"fot: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)


def user_message(error: BaseException) -> str | None:
    """The line to show for an error the user can mend, None for a bug. Looks through what Ray wraps around it."""
    while (cause := getattr(error, "cause", None)) is not None and isinstance(cause, BaseException):
        error = cause
    if isinstance(error, UserError):
        return str(error)
    if any(sign in str(error) for sign in DISK_FULL):  # safetensors, SQLite and torch have errors of their own for it
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on the device{where}: free some, or set work_dir to a larger disk; then run again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"{error.filename}: {os.strerror(error.errno)}: check permissions, or set another work_dir"
    return None
