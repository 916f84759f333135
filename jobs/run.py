"""`fot run` and `fot status`: a recipe's workflow in this process, with Ray beside it."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from jobs.recipe import Recipe, load_recipe
from jobs.registry import ALIAS
from jobs.stages import recipe_stages
from jobs.tracking import tracking_uri
from jobs.train.metrics import last_metrics
from jobs.train.spec import METRICS, MODEL
from jobs.workspace import Workspace, duration
from pipelines.cluster import WantedWorkers
from pipelines.progress import console, say
from pipelines.store import Output, Stage
from pipelines.workflow import workflow_status


def run_recipe(path: Path, overrides: Sequence[str]) -> None:
    """Run everything that is not done yet and print what was made.

    Raises UserError for a mistake in recipe, corpus, checkpoint or machine.
    """
    recipe = load_recipe(path, overrides)
    workspace = Workspace(recipe)
    with workspace.with_ray():
        outputs, seconds = workspace.run(_stages_with_workers)
    _closing_table(recipe, outputs, seconds)


def _stages_with_workers(workspace: Workspace) -> list[Stage]:
    """The recipe's stages, once the cluster has room for the workers that some of them need."""
    stages, resources = recipe_stages(workspace), workspace.recipe.resources
    patience = 60 * resources.wait_minutes
    WantedWorkers(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, patience).wait()
    return stages


def show_status(path: Path, overrides: Sequence[str]) -> None:
    """Print the stages with state, duration and output."""
    workspace = Workspace(load_recipe(path, overrides))
    print(f"{'stage':>15}  {'state':<24}  {'duration':>8}  output")
    for stage, state, seconds, where in workflow_status(recipe_stages(workspace), workspace.store):
        detail = ""
        if state in ("running", "interrupted") and (last := last_metrics(Path(where) / METRICS)):
            detail = f" at step {last['step']}"
        print(f"{stage.name:>15}  {state + detail:<24}  {duration(seconds) if seconds else '':>8}  {where}")


def _closing_table(recipe: Recipe, outputs: Mapping[str, Output], seconds: float) -> None:
    """What was made, where it lies, how to look at it."""
    results = json.loads((outputs["perplexity"].path / "perplexity.json").read_text())
    keys = json.loads((outputs["passkey"].path / "passkey.json").read_text())
    run = json.loads((outputs["register"].path / "run.json").read_text())
    local = results["local_context"]

    table = Table(
        "context",
        "tokens",
        "perplexity base",
        "perplexity FoT",
        title="held-out documents (base: same memory layers, untrained)",
    )
    for context, value in results["fot"].items():
        table.add_row(f"{context}x", str(int(context) * local), f"{results['base'][context]:.3f}", f"{value:.3f}")
    console.print(table)
    table = Table("context", "tokens", "exact", "1 of 10", title="passkey")
    for length, scores in keys.items():
        if length != "local_context":
            table.add_row(f"{length}x", str(int(length) * local), f"{scores['exact']:.0%}", f"{scores['choice']:.0%}")
    console.print(table)

    mlflow = Path(sys.executable).with_name("mlflow")
    made = {
        "FoT model (Hugging Face directory)": outputs["finetune"].path / MODEL,
        "token shards and manifest": outputs["shards"].path,
        "plot": outputs["perplexity"].path / "perplexity.png",
        "MLflow run": run["run_id"],
        "registered model": f"models:/{run['model']}/{run['version']} (alias {ALIAS})",
        "look at runs, plots and models": f"{mlflow} ui --backend-store-uri {tracking_uri(Path(recipe.work_dir))}",
    }
    console.print(f"[bold]{recipe.name}: done in {duration(seconds)}[/bold]")
    for what, where in made.items():  # a line each, never folded, so that paths can be copied
        say(f"  {what:<{max(map(len, made))}}  {where}")
