"""Evaluations as stages of a workflow: one each, between the model and the registry."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.config.evaluation import READERS_TASKS, RIVALS_STAGE, Evaluation, Perplexity
from jobs.config.train_spec import MODEL
from jobs.evaluate.side_by_side import Measured, side_by_side
from jobs.evaluate.subject import Reading, Subject
from jobs.evaluate.tasks import SEE_BASE, check_installed, evaluate, plugin_version, reads_documents
from jobs.measures.result import RESULT, Result
from jobs.workflow.data_stages import INDEX, SHARDS, Inputs, directory_files
from pipelines.config import Part
from pipelines.sources.file_hashes import FileHashes
from pipelines.workflow.errors import UserError
from pipelines.workflow.store import Stage


def evaluation_stages(
    evaluation: Evaluation, models: Mapping[str, str], local: int, seed: int, hashes: FileHashes
) -> list[Stage]:
    """A stage for each task asked for; one for each rival in each, and one that lays them side by side. `models`: names
    of the stages that hold "model" and, if there is one, "base".

    Raises UserError for a rival that cannot be measured here.
    """
    stages = [_stage(evaluation, name, models, local, seed, hashes) for name in evaluation.tasks]
    if not evaluation.rivals:
        return stages
    check_installed(evaluation.rivals)
    measured = {
        (task, rival): _rival_stage(evaluation, task, rival, models.get("base", models["model"]), local, seed)
        for task in evaluation.rivalled
        for rival in evaluation.rivals
    }
    return [*stages, *measured.values(), _side_by_side(evaluation)]


def _stage(
    evaluation: Evaluation,
    name: str,
    models: Mapping[str, str],
    local: int,
    seed: int,
    hashes: FileHashes,
) -> Stage:
    settings = evaluation.tasks[name]
    seen = {who: stage for who, stage in models.items() if who == "model" or name in SEE_BASE}
    texts = (SHARDS, INDEX) if reads_documents(name) else ()
    reading = Reading(evaluation.reader) if name in READERS_TASKS else Reading()

    def run(output: Path, inputs: Inputs) -> None:
        evaluate(name, _subject(inputs, seen, local, seed, evaluation, reading), settings, output)

    params: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "memory": evaluation.memory.model_dump(mode="json"),
        "local": local,
        "seed": seed,
        "files": _named_files(settings, hashes),
    }
    if reading.kind != "memory":
        params["reader"] = reading.kind
    if evaluation.dtype is not None:
        params["dtype"] = evaluation.dtype
    if name == "lm_eval":
        params["version"] = _version("lm_eval")
    if (made_by := plugin_version(name)) is not None:
        params["plugin"] = made_by
    inputs = (*texts, *seen.values())
    return Stage(name, run, params, inputs, version=4 if name in READERS_TASKS else 3, content=RESULT)


def _rival_stage(evaluation: Evaluation, task: str, rival: str, base: str, local: int, seed: int) -> Stage:
    """A task as one rival does it, which depends on the base alone: another fine-tuning of it finds this measured.

    Raises UserError where not even the shortest length is within `rivals_up_to`.
    """
    settings, up_to = evaluation.rivalled[task], evaluation.rivals_up_to
    lengths = [length * local for name in ("contexts", "lengths") for length in getattr(settings, name, ())]
    within = [tokens for tokens in lengths if tokens <= up_to]
    if not within:
        raise UserError(
            f"evaluation.rivals_up_to is {up_to} tokens, the shortest length of evaluation.{task} {min(lengths)}: "
            f"raise the one or lower the other"
        )
    if isinstance(settings, Perplexity):
        settings = settings.model_copy(update={"others": ()})  # read into memory, which rivals have not
    reading = Reading(rival, up_to, max(within))
    texts = (SHARDS, INDEX) if reads_documents(task) else ()

    def run(output: Path, inputs: Inputs) -> None:
        evaluate(task, _subject(inputs, {"model": base}, local, seed, evaluation, reading), settings, output)

    params = {
        "settings": settings.model_dump(mode="json"),
        "reader": rival,
        "up_to": up_to,
        "local": local,
        "seed": seed,
        **({"version": _version("bm25s")} if rival == "bm25" else {}),
        **({} if evaluation.dtype is None else {"dtype": evaluation.dtype}),
    }
    return Stage(f"{task}-{rival}", run, params, (*texts, base), version=1, content=RESULT)


def _side_by_side(evaluation: Evaluation) -> Stage:
    """All readers in one table and one plot."""
    own = {task: Measured(task, {"model": "model", "base": "base"}) for task in evaluation.rivalled}
    rivals = {
        f"{task}-{rival}": Measured(task, {"model": rival})
        for task in evaluation.rivalled
        for rival in evaluation.rivals
    }
    measured = {**own, **rivals}

    def run(output: Path, inputs: Inputs) -> None:
        side_by_side(RIVALS_STAGE, measured, inputs, "model", output).write(output)

    return Stage(RIVALS_STAGE, run, {"rivals": list(evaluation.rivals)}, tuple(measured), content=RESULT)


def _subject(
    inputs: Inputs, models: Mapping[str, str], local: int, seed: int, evaluation: Evaluation, reading: Reading
) -> Subject:
    return Subject(
        models={who: inputs[stage] / MODEL for who, stage in models.items()},
        local=local,
        seed=seed,
        memory=evaluation.memory,
        shards=inputs.get(SHARDS),
        documents=inputs.get(INDEX),
        reading=reading,
        dtype=evaluation.dtype,
    )


def _version(package: str) -> str | None:
    """Of a package whose next version may ask other questions."""
    try:
        return version(package)
    except PackageNotFoundError:  # as the task itself will say
        return None


def _named_files(settings: Part, hashes: FileHashes) -> dict[str, Any]:
    """Content hashes of the local files that settings name: edited, they are asked anew."""
    found: dict[str, Any] = {}
    for name, value in settings:
        path = Path(value).expanduser() if name in ("train", "test", "include") and isinstance(value, str) else None
        if path is not None and path.is_file():
            found[name] = hashes.hash(path)
        elif path is not None and path.is_dir():
            found[name] = directory_files(path, hashes)
    return found


def read_results(tasks: Sequence[str], inputs: Inputs) -> list[tuple[Result, Path]]:
    """The result of each task, with the directory of its plots."""
    return [(Result.read(inputs[name]), inputs[name]) for name in tasks]
