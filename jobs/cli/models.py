"""What is done with a checkpoint: `fot evaluate`, `fot probe`, `fot export`."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import rebuild_option


@click.command()
@click.argument("checkpoint")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; by default what was trained in.")
@click.option("--adapter", is_flag=True, help="Only what was trained, as an adapter of the base.")
@click.option("--base", metavar="CHECKPOINT", help="The base of a part, as for fot evaluate.")
@click.option("--work-dir", default="runs", show_default=True, metavar="DIR", help="Holds a base that is made.")
def export(checkpoint: str, directory: Path, dtype: str | None, adapter: bool, base: str | None, work_dir: str) -> None:
    """Write a training's CHECKPOINT (path or URL), or an adapter and its base, as a Hugging Face DIRECTORY."""
    from jobs.train.export import export
    from jobs.workflow.workspace import WorkDir

    where = None if base is None else WorkDir("export", work_dir).find_model(base)
    export(checkpoint, directory, dtype, adapter, where)
    print(f"exported to {directory}")


@click.command()
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
@rebuild_option
@click.option("--work-dir", default="runs", show_default=True, metavar="DIR", help="Holds all that is made.")
def evaluate(checkpoint: str, tasks: tuple[str, ...], texts: tuple[str, ...], **settings: Any) -> None:
    """Measure CHECKPOINT (a Hugging Face directory, a hub id, a .gguf file, package:NAME/FILE, models:/fot/NAME@ALIAS)
    and record what came out."""
    from jobs.cli.commands.evaluate import EvaluateRequest, evaluate_checkpoint

    evaluate_checkpoint(EvaluateRequest(checkpoint=checkpoint, tasks=tasks, texts=texts, **settings))


@click.command()
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
    from jobs.cli.commands.probe import ProbeRequest, probe_model

    probe_model(ProbeRequest(model, layers, settings, work_dir))
