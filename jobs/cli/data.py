"""`fot data`: a recipe's data."""

from pathlib import Path

import click

from jobs.cli.options import recipe_argument, set_option

training_option = click.option(
    "--training",
    default="finetune",
    show_default=True,
    metavar="NAME",
    help="finetune, or base where it is pre-trained.",
)


@click.group()
def data() -> None:
    """Make, check, mend and look at a recipe's data."""


@data.command()
@recipe_argument
@set_option
def prepare(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Tokenize and pack what is new in the sources; train nothing."""
    from jobs.cli.commands import data as commands

    commands.prepare(recipe, overrides)


@data.command()
@recipe_argument
@set_option
def verify(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Compare all files with their checksums and counts."""
    from jobs.cli.commands import data as commands

    commands.verify(recipe, overrides)


@data.command()
@recipe_argument
@set_option
def repair(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make damaged or missing files again from the sources, the same to the byte."""
    from jobs.cli.commands import data as commands

    commands.repair(recipe, overrides)


@data.command()
@recipe_argument
@set_option
@training_option
@click.option("--step", required=True, type=click.IntRange(min=0), help="Which step, from 0.")
def show(recipe: Path, overrides: tuple[str, ...], training: str, step: int) -> None:
    """Print a step's batch: its documents, and which serve which as negatives."""
    from jobs.cli.commands import data as commands

    commands.show(recipe, overrides, step, training)


@data.command()
@recipe_argument
@set_option
@training_option
def inspect(recipe: Path, overrides: tuple[str, ...], training: str) -> None:
    """Print sources, document lengths, epochs, samples and the plan."""
    from jobs.cli.commands import data as commands

    commands.inspect(recipe, overrides, training)
