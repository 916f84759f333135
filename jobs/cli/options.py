"""Arguments and options that several commands take."""

from pathlib import Path

import click

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe: finetune.steps=200."
)
work_dir_option = click.option(
    "--work-dir", default="runs", show_default=True, type=click.Path(path_type=Path), help="A recipe's work_dir."
)
rebuild_option = click.option(
    "--rebuild", is_flag=True, help="Make anew what is damaged and took long; what is there is set aside."
)
