"""Evaluations as stages of a workflow: one each, between the model and the registry."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.data.stages import DOCUMENTS, SHARDS, Inputs, directory_files
from jobs.evaluate.config import Evaluation
from jobs.evaluate.result import RESULT, Result
from jobs.evaluate.subject import Subject
from jobs.evaluate.tasks import READ_DOCUMENTS, SEE_BASE, evaluate
from jobs.train.spec import MODEL
from pipelines.config import Part
from pipelines.hashing import FileHashes
from pipelines.store import Stage


def evaluation_stages(
    evaluation: Evaluation, models: Mapping[str, str], local: int, seed: int, hashes: FileHashes
) -> list[Stage]:
    """A stage for each task asked for. `models`: names of the stages that hold "model" and, if there is one, "base"."""
    return [_stage(evaluation, name, models, local, seed, hashes) for name in evaluation.tasks]


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
    texts = (SHARDS, DOCUMENTS) if name in READ_DOCUMENTS else ()

    def run(output: Path, inputs: Inputs) -> None:
        subject = Subject(
            models={who: inputs[stage] / MODEL for who, stage in seen.items()},
            local=local,
            seed=seed,
            memory=evaluation.memory,
            shards=inputs.get(SHARDS),
            documents=inputs.get(DOCUMENTS),
        )
        evaluate(name, subject, settings, output)

    params: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "memory": evaluation.memory.model_dump(mode="json"),
        "local": local,
        "seed": seed,
        "files": _named_files(settings, hashes),
    }
    if name == "lm_eval":
        params["version"] = _version("lm_eval")
    return Stage(name, run, params, inputs=(*texts, *seen.values()), version=3, content=RESULT)


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
