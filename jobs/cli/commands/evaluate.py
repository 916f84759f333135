"""`fot evaluate`: any checkpoint, any of the evaluations, as a workflow of its own."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.common.version import code_version
from jobs.config.evaluation import Evaluation
from jobs.config.recipe import Name, Texts
from jobs.config.registry import Registry
from jobs.config.settings import override, validated
from jobs.config.train_spec import MODEL
from jobs.evaluate.subject import check_models, read_tokenizer
from jobs.evaluate.tasks import MODULES, NEED_NO_TOKENIZER, check_installed, reads_documents, task_names
from jobs.measures.tables import print_results
from jobs.models.base import check_vocabulary, look_at_checkpoint
from jobs.registry.record import register
from jobs.registry.server import locked
from jobs.train.export import merge_adapter
from jobs.workflow.data_stages import Inputs, directory_files, index_stage, look_at_corpus, shards_stage
from jobs.workflow.evaluation_stages import evaluation_stages, read_results
from jobs.workflow.outcome import REPORT, make_outcome, report_stage
from jobs.workflow.workspace import MODELS, WorkDir, duration
from pipelines.config import Part, source_of
from pipelines.sources.file_hashes import FileHashes
from pipelines.tokens.tokenizer import has_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.progress import console, say
from pipelines.workflow.store import Stage, link


class Named(Part):
    """What an evaluation is called: as strictly as a recipe."""

    name: Name


@dataclass(frozen=True)
class EvaluateRequest:
    """What the command line says. `rivals`: other ways to read, without training; `adapter`: of the checkpoint, a
    directory; `texts`: files to evaluate on, each a source; `local`: tokens of the local context, None for the model's
    own; `rebuild`: what is damaged and took long is measured anew."""

    checkpoint: str
    tasks: Sequence[str]
    rivals: Sequence[str]
    overrides: Sequence[str]
    adapter: str | None
    base: str | None
    texts: Sequence[str]
    local: int | None
    name: str
    seed: int
    work_dir: str
    rebuild: bool = False


def evaluate_checkpoint(request: EvaluateRequest) -> None:
    """Measure, print, record. Raises UserError for whatever cannot be evaluated, before anything is measured."""
    validated(Named, {"name": request.name}, "fot evaluate")
    evaluation = chosen(request.tasks, request.overrides, request.rivals)
    check_installed(evaluation.rivals)
    if needy := [] if request.texts else sorted(filter(reads_documents, evaluation.tasks)):
        raise UserError(f"{needy[0]} is measured on text: give some with --data FILES")
    work = WorkDir(request.name, request.work_dir, rebuild=request.rebuild)
    with work.with_ray():
        if request.adapter and request.rivals and request.base is None:
            request = replace(request, base=request.checkpoint)  # rivals are the base's, without what was trained
        given = {"model": request.checkpoint, **({} if request.base is None else {"base": request.base})}
        models = {name: _find(checkpoint, work) for name, checkpoint in given.items()}
        if request.adapter is not None:
            models["model"] = _merged(models["model"], Path(request.adapter).expanduser().resolve(), work)
        check_models(models, _local(request, evaluation, models["model"]))
        if set(evaluation.tasks) - NEED_NO_TOKENIZER:
            for name, path in models.items():
                _check_tokenizer(given[name], path)
        outputs, seconds = work.run(lambda: _stages(request, evaluation, models, work))
        made = {name: output.path for name, output in outputs.items()}
        tags = {
            "fot.kind": "evaluation",
            "fot.model": request.checkpoint,
            **({} if request.adapter is None else {"fot.adapter": request.adapter}),
            "fot.files": hash_json(outputs["model"].params["files"]),
        }
        recorded = register(make_outcome(request.name, evaluation.results, made, tags), work.directory, Registry())
    print_results(read_results(evaluation.results, made))
    console.print(f"[bold]{request.name}: done in {duration(seconds)}[/bold]")
    say(f"  report      {made['report'] / REPORT}")
    say(f"  MLflow run  {recorded['run_id'] or 'kept for `fot registry sync`'}")


def chosen(tasks: Sequence[str], overrides: Sequence[str], rivals: Sequence[str] = ()) -> Evaluation:
    """The settings of the tasks asked for, all others left out; keys may begin with `evaluation.` as in a recipe.

    Raises UserError for an unknown task, and for settings of one that is not asked for."""
    names = task_names()
    for task in tasks:
        if task not in names:
            near = difflib.get_close_matches(task, names, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(names)}"
            raise UserError(f"--task {task} is unknown: {hint}")
    content: dict[str, object] = {**dict.fromkeys(MODULES), **{name: {} for name in tasks}}
    if rivals:
        content["rivals"] = list(dict.fromkeys(rivals))
    for text in overrides:
        setting = text.removeprefix("evaluation.")
        task = re.split("[.=]", setting)[0]
        if task in names and task not in tasks:
            raise UserError(f"--set {text}: {task} is not asked for: add --task {task} or leave this out")
        override(content, setting)
    return validated(Evaluation, content, "fot evaluate")


def _find(checkpoint: str, work: WorkDir) -> Path:
    """A checkpoint's directory. Raises UserError where it is no LLaMA's."""
    path = work.find_model(checkpoint)
    if not (path / "config.json").exists() and any(path.glob("step-*")):
        raise UserError(
            f"{checkpoint} holds a training's checkpoints: `fot export {checkpoint} DIRECTORY` makes a model"
        )
    look_at_checkpoint(path)
    return path.resolve()


def _merged(base: Path, adapter: Path, work: WorkDir) -> Path:
    """A base with its adapter, as a directory of work_dir that is made once. Raises UserError as `merge_adapter`."""
    with work.hashes() as hashes:
        key = hash_json([directory_files(base, hashes), directory_files(adapter, hashes)])[:16]
    merged = work.directory / MODELS / f"{adapter.name}-{key}"
    merged.parent.mkdir(exist_ok=True)
    with locked(merged.parent / f".{merged.name}.lock"):
        if not merged.exists():
            merge_adapter(adapter, base, merged)
    return merged


def _check_tokenizer(checkpoint: str, path: Path) -> None:
    """Raises UserError where there is none beside the weights, or not the model's."""
    if not has_tokenizer(path):
        raise UserError(f"{checkpoint} has no tokenizer: put its tokenizer.json or tokenizer.model beside the weights")
    check_vocabulary(path, read_tokenizer(path))


def _stages(request: EvaluateRequest, evaluation: Evaluation, models: dict[str, Path], work: WorkDir) -> list[Stage]:
    local = _local(request, evaluation, models["model"])
    with work.hashes() as hashes:
        stages = [_model_stage(name, path, hashes) for name, path in models.items()]
        if request.texts:
            texts = _texts(request, models["model"])
            corpus = look_at_corpus(texts, work.store, hashes)
            stages += [corpus.tokenizer, shards_stage(texts, corpus), index_stage(texts)]
        stages += evaluation_stages(evaluation, {name: name for name in models}, local, request.seed, hashes)
    settings = {
        "checkpoint": request.checkpoint,
        "base": request.base,
        "local": local,
        "seed": request.seed,
        "evaluation": evaluation.model_dump(mode="json"),
    }
    if request.adapter is not None:
        settings["adapter"] = request.adapter
    facts = {"model": request.checkpoint, "base": request.base or "none", "code": code_version()}
    made = [stage.name for stage in stages]
    return [*stages, report_stage(request.name, evaluation.results, settings, lambda inputs, results: facts, made)]


def _local(request: EvaluateRequest, evaluation: Evaluation, model: Path) -> int:
    """Tokens of the local context: as asked for, else the model's own."""
    config = json.loads((model / "config.json").read_text())
    own = config.get("local_context") or config["max_position_embeddings"]
    return int(request.local or evaluation.local or own)


def _model_stage(name: str, path: Path, hashes: FileHashes) -> Stage:
    """A model that is there already, by the content of its files."""
    files = directory_files(path, hashes)

    def bring(output: Path, inputs: Inputs) -> None:
        write_atomically(output / "files.json", json.dumps(files, indent=1).encode())
        link(path, output / MODEL)

    return Stage(name, bring, {"path": str(path), "files": files})


def _texts(request: EvaluateRequest, model: Path) -> Texts:
    """All of the files, held out, in the model's own tokens; each a source, named by its place where a name repeats."""
    names = [re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.split(".")[0]).strip("-") for path in request.texts]
    unique = [name if name and names.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(names)]
    sources = [
        {"name": name, "held_out": 1.0, **source_of(path)} for name, path in zip(unique, request.texts, strict=True)
    ]
    content = {"name": request.name, "seed": request.seed, "work_dir": request.work_dir}
    return validated(
        Texts, {**content, "data": {"sources": sources}, "base": {"checkpoint": str(model)}}, "fot evaluate"
    )
