"""The `fot` command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import click

from jobs.stop import STOPPED, StoppedError
from pipelines.environment import prepare_environment
from pipelines.errors import UserError
from pipelines.visible import visible

DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
    "PytorchStreamWriter failed",
    "unexpected pos",
)
OF_A_CLUSTER = ("submit", "jobs", "status", "logs", "stop", "resume")
INTERRUPTED = 130
USER_ERROR = 2


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


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe: finetune.steps=200."
)


@fot.command()
@recipe_argument
@set_option
def run(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Run a recipe from corpus to registered model. Finished stages are not run again."""
    from jobs.run import run_recipe

    run_recipe(recipe, overrides)


address_option = click.option("--address", metavar="URL", help="The cluster's dashboard: http://HOST:8265.")
follow_option = click.option("-f", "--follow", "log", is_flag=True, help="Print what it prints until it has ended.")
wait_option = click.option("--wait", is_flag=True, help="Wait until it has ended.")
job_argument = click.argument("job")


@fot.command()
@click.argument("recipe_or_job")
@set_option
@address_option
def status(recipe_or_job: str, overrides: tuple[str, ...], address: str | None) -> None:
    """Show the stages of a recipe or of a job: state, duration, output."""
    if Path(recipe_or_job).exists() or recipe_or_job.endswith((".yaml", ".yml")):
        from jobs.run import show_status

        show_status(Path(recipe_or_job), overrides)
    else:
        from jobs.submit import commands

        commands.show_job(recipe_or_job, address)


@fot.command()
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
    from jobs.submit import commands

    commands.submit(commands.Request(recipe=recipe, overrides=overrides, **request))


@fot.command("jobs")
@address_option
@click.option("--owner", metavar="NAME")
@click.option("--name", metavar="NAME")
def jobs_(address: str | None, owner: str | None, name: str | None) -> None:
    """List a cluster's jobs, the newest first."""
    from jobs.submit import commands

    commands.show_jobs(address, owner, name)


@fot.command()
@job_argument
@address_option
@follow_option
def logs(job: str, address: str | None, log: bool) -> None:
    """Print what a JOB has printed."""
    from jobs.submit import commands

    commands.show_log(job, address, log)


@fot.command()
@job_argument
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a JOB, a training after a checkpoint."""
    from jobs.submit import commands

    commands.stop(job, address)


@fot.command()
@job_argument
@address_option
@follow_option
@wait_option
def resume(job: str, address: str | None, log: bool, wait: bool) -> None:
    """Run a JOB again; it goes on from where it is."""
    from jobs.submit import commands

    commands.resume(job, address, log, wait)


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
    from jobs.manifest import Deployment, show_manifest

    show_manifest(recipe, overrides, Deployment(**settings))


@fot.command()
@click.argument("checkpoint")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; by default what was trained in.")
@click.option("--adapter", is_flag=True, help="Only what was trained, as an adapter of the base.")
@click.option("--base", metavar="CHECKPOINT", help="The base of a part, as for fot evaluate.")
@click.option("--work-dir", default="runs", show_default=True, metavar="DIR", help="Holds a base that is made.")
def export(checkpoint: str, directory: Path, dtype: str | None, adapter: bool, base: str | None, work_dir: str) -> None:
    """Write a training's CHECKPOINT (path or URL), or an adapter and its base, as a Hugging Face DIRECTORY."""
    from jobs.train.export import export
    from jobs.workspace import WorkDir

    where = None if base is None else WorkDir("export", work_dir).find_model(base)
    export(checkpoint, directory, dtype, adapter, where)
    print(f"exported to {directory}")


@fot.command()
@click.argument("checkpoint")
@click.option("--task", "tasks", multiple=True, required=True, metavar="NAME", help="perplexity, passkey... (repeat)")
@click.option("--data", "texts", multiple=True, metavar="FILES", help="Text to measure on: a source's path (repeat).")
@click.option("--adapter", metavar="DIR", help="An adapter that was trained from CHECKPOINT, to measure both together.")
@click.option("--base", metavar="CHECKPOINT", help="Measure this one beside it.")
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    metavar="NAME",
    help="Another way for the base to read: full, yarn, dynamic_ntk, bm25 (repeat).",
)
@click.option("--local", type=click.IntRange(min=2), help="Tokens of the local context; the model's own by default.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Settings: passkey.lengths=[4,16], memory.top_k=128."
)
@click.option("--name", default="evaluation", show_default=True, help="The experiment's name.")
@click.option("--seed", default=0, show_default=True)
@click.option("--work-dir", default="runs", show_default=True, metavar="DIR", help="Holds all that is made.")
def evaluate(checkpoint: str, tasks: tuple[str, ...], texts: tuple[str, ...], **settings: Any) -> None:
    """Measure CHECKPOINT (a Hugging Face directory, a hub id, a .gguf file, package:NAME/FILE, models:/fot/NAME@ALIAS)
    and record what came out."""
    from jobs.evaluate.commands import Request, evaluate_checkpoint

    evaluate_checkpoint(Request(checkpoint=checkpoint, tasks=tasks, texts=texts, **settings))


@fot.command()
@click.argument("model")
@click.option(
    "--layers", type=click.IntRange(1), metavar="N", help="Memory layers to choose; by default the paper's number."
)
@click.option("--prompts", type=int, metavar="N", help="Of each kind.  [default: 8]")
@click.option("--local", type=int, metavar="N", help="What is nearer is not asked for; by default 512 tokens or less.")
@click.option("--tokens", type=int, metavar="N", help="Of a prompt; by default four times --local.")
@click.option("--data", "text", metavar="FILES", help="Natural text; by default Python's standard library.")
@click.option(
    "--causal", type=int, metavar="N", help="With N prompts of each kind, also measure what layers are worth."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--work-dir", default="runs", show_default=True, metavar="DIR", help="Holds all that is made.")
def probe(model: str, layers: int | None, work_dir: str, **settings: Any) -> None:
    """Rank MODEL's layers and heads by the attention that falls on what must be retrieved from afar."""
    from jobs.probe.commands import Request, probe_model

    probe_model(Request(model, layers, settings, work_dir))


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


@fot.group()
def registry() -> None:
    """List, show and compare what was run; upload what waited for MLflow."""


registry_work_dir = click.option(
    "--work-dir", default="runs", show_default=True, type=click.Path(path_type=Path), help="A recipe's work_dir."
)
registry_uri = click.option("--uri", metavar="URI", help="A tracking server or database instead.")


@registry.command("list")
@click.option("--name", metavar="NAME", help="Of this experiment, which is a recipe's name.")
@click.option("--filter", "asked", metavar="TEXT", help='"metric passkey/exact@65536 >= 0.9", or as MLflow has them.')
@registry_work_dir
@registry_uri
def list_(name: str | None, asked: str | None, work_dir: Path, uri: str | None) -> None:
    """List runs, the newest first."""
    from jobs.registry import commands

    commands.show_list(work_dir, uri, name, asked)


@registry.command("show")
@click.argument("run")
@registry_work_dir
@registry_uri
def show_run(run: str, work_dir: Path, uri: str | None) -> None:
    """Show a RUN (how its id begins, or NAME[@ALIAS|/VERSION] of a model) and all that led to it."""
    from jobs.registry import commands

    commands.show_run(work_dir, uri, run)


@registry.command()
@click.argument("runs", nargs=-1, required=True)
@registry_work_dir
@registry_uri
def compare(runs: tuple[str, ...], work_dir: Path, uri: str | None) -> None:
    """Put RUNS side by side: settings that differ, metrics, curves."""
    from jobs.registry import commands

    commands.compare(work_dir, uri, runs)


@registry.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@registry_work_dir
@registry_uri
def ui(port: int, work_dir: Path, uri: str | None) -> None:
    """Open MLflow's pages, for this machine alone."""
    from jobs.registry import commands

    commands.open_pages(work_dir, uri, port)


@registry.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@registry_work_dir
@registry_uri
def sync(recipe: Path | None, work_dir: Path, uri: str | None) -> None:
    """Upload what MLflow could not be told, of RECIPE or of a work_dir."""
    from jobs.registry import commands

    if recipe is None:
        commands.sync_all(work_dir, uri)
    else:
        commands.sync_recipe(recipe, uri)


@fot.group()
def schedule() -> None:
    """Run a recipe by cron on what is new, going on with its champion."""


schedule_name = click.argument("name")


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
    from jobs.schedule import commands

    commands.add(commands.Request(recipe=recipe, overrides=overrides, **request))


@schedule.command("list")
@registry_work_dir
def list_schedules(work_dir: Path) -> None:
    """List schedules: when they fire next, what they came to last."""
    from jobs.schedule import commands

    commands.show_list(work_dir)


@schedule.command("pause")
@schedule_name
@registry_work_dir
def pause_schedule(name: str, work_dir: Path) -> None:
    """Have NAME fire no more by cron."""
    from jobs.schedule import commands

    commands.pause(work_dir, name)


@schedule.command("resume")
@schedule_name
@registry_work_dir
def resume_schedule(name: str, work_dir: Path) -> None:
    """Have NAME fire by cron again."""
    from jobs.schedule import commands

    commands.resume(work_dir, name)


@schedule.command("remove")
@schedule_name
@registry_work_dir
def remove_schedule(name: str, work_dir: Path) -> None:
    """Remove NAME; its history is kept aside."""
    from jobs.schedule import commands

    commands.remove_schedule(work_dir, name)


@schedule.command("run-now")
@schedule_name
@registry_work_dir
def run_now(name: str, work_dir: Path) -> None:
    """Fire NAME here and now."""
    from jobs.schedule import commands

    commands.run_now(work_dir, name)


@schedule.command("history")
@schedule_name
@registry_work_dir
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw perplexity over time, as PNG.")
def show_history(name: str, work_dir: Path, plot: Path | None) -> None:
    """Show what NAME has fired, and perplexity over time."""
    from jobs.schedule import commands

    commands.show_history(work_dir, name, plot)


@schedule.command("serve")
@registry_work_dir
@click.option("--port", default=4200, show_default=True, type=click.IntRange(1, 65535), help="Of Prefect's pages.")
def serve_schedules(work_dir: Path, port: int) -> None:
    """Fire schedules by cron and show Prefect's pages, until Ctrl-C or SIGTERM."""
    from jobs.schedule import commands

    commands.serve(work_dir, port)


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
