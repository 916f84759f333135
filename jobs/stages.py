"""The stages of a recipe: what each makes, of what, by which function.

data stages (jobs/data/stages.py) -> base -> finetune -> perplexity, passkey -> register
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.data.stages import DOCUMENTS, SHARDS, Corpus, Inputs, data_stages, look_at_corpus, repair_shards
from jobs.evaluate.passkey import passkey
from jobs.evaluate.perplexity import Scoring, perplexity
from jobs.plot import plot_perplexity
from jobs.recipe import Recipe
from jobs.registry import Outcome, record
from jobs.train.estimate import tokens_per_step
from jobs.train.spec import MODEL
from jobs.train.stages import RUN, base_stage, finetune_stage
from jobs.version import code_version
from jobs.workspace import Workspace
from pipelines.dataset import DamagedShardError
from pipelines.files import write_atomically
from pipelines.hashing import hash_json
from pipelines.progress import Progress, say
from pipelines.shards import Manifest
from pipelines.store import RECORD, Stage


def recipe_stages(workspace: Workspace) -> list[Stage]:
    """The recipe's workflow. Looks at the corpus and the base checkpoint, which name the first stages.

    Raises UserError for what is missing or unusable there.
    """
    recipe = workspace.recipe
    with workspace.hashes() as hashes:
        corpus = look_at_corpus(recipe, workspace.store, hashes)
        return [
            *data_stages(recipe, corpus),
            _repairing(recipe, corpus, base_stage(workspace, hashes)),
            _repairing(recipe, corpus, finetune_stage(workspace)),
            _repairing(recipe, corpus, _perplexity_stage(recipe)),
            _passkey_stage(recipe),
            _register_stage(recipe, workspace.directory),
        ]


def _perplexity_stage(recipe: Recipe) -> Stage:
    settings, local = recipe.evaluation.perplexity, recipe.finetune.objective.context

    def run(output: Path, inputs: Inputs) -> None:
        memory = _memory_settings(inputs["finetune"] / MODEL)
        results = {
            name: perplexity(
                Scoring(inputs[stage] / MODEL, memory, inputs[SHARDS], inputs[DOCUMENTS], local, settings.contexts),
                settings.windows,
                f"ppl {name}",
            )
            for name, stage in (("base", "base"), ("fot", "finetune"))
        }
        write_atomically(output / "perplexity.json", json.dumps({"local_context": local, **results}, indent=1).encode())
        plot_perplexity(results["base"], results["fot"], local, output / "perplexity.png")

    params = {**_dump(settings), "local": local}
    return Stage("perplexity", run, params, inputs=("tokenizer", SHARDS, DOCUMENTS, "base", "finetune"))


def _passkey_stage(recipe: Recipe) -> Stage:
    settings, local = recipe.evaluation.passkey, recipe.finetune.objective.context

    def run(output: Path, inputs: Inputs) -> None:
        results = passkey(
            inputs["finetune"] / MODEL, local, settings.lengths, settings.trials, settings.digits, recipe.seed
        )
        write_atomically(output / "passkey.json", json.dumps({"local_context": local, **results}, indent=1).encode())

    return Stage("passkey", run, {**_dump(settings), "local": local, "seed": recipe.seed}, inputs=("finetune",))


def _register_stage(recipe: Recipe, work_dir: Path) -> Stage:
    """One MLflow run that leads back to everything it came from, and a registered model version."""
    described = recipe.model_dump(mode="json", exclude={"work_dir"})

    def run(output: Path, inputs: Inputs) -> None:
        with Progress("register", 1, "runs") as progress:
            write_atomically(output / "recipe.json", json.dumps(described, indent=1).encode())
            write_atomically(output / "lineage.json", json.dumps(_lineage(inputs), indent=1).encode())
            outcome = _outcome(recipe, hash_json(described), inputs, output)
            write_atomically(output / "run.json", json.dumps(record(outcome, work_dir), indent=1).encode())
            progress.advance(1)

    inputs = ("tokenizer", SHARDS, DOCUMENTS, "finetune-groups", "base", "finetune", "perplexity", "passkey")
    return Stage("register", run, {"recipe": described}, inputs=inputs)


def _lineage(inputs: Inputs) -> dict[str, Any]:
    """For every stage: its key, parameters and the hash of each of its files."""
    return {name: json.loads((path / RECORD).read_text()) for name, path in inputs.items()}


def _outcome(recipe: Recipe, recipe_hash: str, inputs: Inputs, output: Path) -> Outcome:
    manifest = Manifest.read(inputs[SHARDS])
    results = json.loads((inputs["perplexity"] / "perplexity.json").read_text())
    keys = json.loads((inputs["passkey"] / "passkey.json").read_text())
    local = results["local_context"]
    finished = (inputs["perplexity"] / RECORD).stat().st_mtime
    metrics = [
        (f"perplexity/{model}", value, int(context) * local, finished)
        for model in ("base", "fot")
        for context, value in results[model].items()
    ]
    metrics += [
        (f"passkey/{score}", value, int(length) * local, finished)
        for length, scores in keys.items()
        if length != "local_context"
        for score, value in scores.items()
    ]
    base = inputs["base"] / MODEL
    origin = str(base.resolve()) if base.is_symlink() else f"pre-trained here, stage key {inputs['base'].name}"
    return Outcome(
        key=hash_json([recipe_hash, *(path.name for path in inputs.values())])[:16],
        name=recipe.name,
        tags={
            "fot.recipe": recipe_hash,
            "fot.code": code_version(),
            "fot.manifest": manifest.hash,
            "fot.base": origin,
            "fot.tokens_seen": str(tokens_per_step(recipe.finetune) * recipe.finetune.steps),
        },
        params={
            "recipe": recipe.name,
            "seed": recipe.seed,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "context": local,
            "steps": recipe.finetune.steps,
            "learning_rate": recipe.finetune.optimizer.learning_rate,
            "zero_stage": recipe.finetune.deepspeed.zero_stage,
            "workers": recipe.resources.workers,
        },
        metrics=metrics,
        artifacts={
            "recipe": output / "recipe.json",
            "lineage": output / "lineage.json",
            "perplexity": inputs["perplexity"],
            "passkey": inputs["passkey"],
        },
        model=inputs["finetune"] / MODEL,
        trainings=[
            json.loads(file.read_text())["run_id"]
            for file in (inputs[stage] / RUN for stage in ("base", "finetune"))
            if file.exists()
        ],
    )


def _repairing(recipe: Recipe, corpus: Corpus, stage: Stage) -> Stage:
    """The stage, which on finding a damaged shard has the data set repaired and goes on, where the recipe says so."""

    def run(output: Path, inputs: Inputs) -> None:
        try:
            stage.run(output, inputs)
        except DamagedShardError as error:
            say(f"{error}: done now, as data.auto_repair says")
            repair_shards(recipe.data, corpus.entries, inputs["tokenizer"], inputs[SHARDS])
            stage.run(output, inputs)

    return replace(stage, run=run) if recipe.data.auto_repair else stage


def _memory_settings(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    return {name: config[name] for name in ("mem_layers", "mem_positionals")}


def _dump(part: Any) -> dict[str, Any]:
    return dict(part.model_dump(mode="json"))
