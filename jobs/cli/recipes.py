"""`fot run`, `fot plan`, `fot manifest`: what is done with a recipe here."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import rebuild_option, recipe_argument, set_option


@click.command()
@recipe_argument
@set_option
@rebuild_option
def run(recipe: Path, overrides: tuple[str, ...], rebuild: bool) -> None:
    """Run a recipe from corpus to registered model. Finished stages are not run again."""
    from jobs.workflow.run import run_recipe

    run_recipe(recipe, overrides, rebuild)


@click.command()
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
    from jobs.cluster.plan import show_plan

    show_plan(recipe, overrides, device, mfu)


@click.command()
@recipe_argument
@set_option
@click.option("--image", required=True, metavar="IMAGE", help="Holds this package, and Ray of its version.")
@click.option(
    "--claim", required=True, metavar="PVC", help="The PersistentVolumeClaim (ReadWriteMany) for work_dir and corpora."
)
@click.option("--namespace", metavar="NAME")
@click.option("--secret", metavar="NAME", help="Its keys become environment variables: credentials of buckets, MLflow.")
@click.option("--gpus-per-node", default=8, show_default=True, type=click.IntRange(1))
@click.option("--cron", metavar="LINE", help='Again and again instead of once: "0 2 * * *".')
@click.option("--time-zone", default="UTC", show_default=True, metavar="NAME", help="What --cron is read in.")
def manifest(recipe: Path, overrides: tuple[str, ...], **settings: Any) -> None:
    """Print what runs RECIPE on Kubernetes, for `kubectl apply -f -`: a RayJob, or with --cron a RayCronJob."""
    from jobs.cluster.kuberay import Deployment, show_manifest

    show_manifest(recipe, overrides, Deployment(**settings))
