"""Tasks of the lm-evaluation-harness: the base beside the model, and what training made of it.

A cell is a task, or a group of tasks, for one of the two. Where a metric is the mean over a task's examples, the
standard error of the difference is that of the differences example by example; else that of two independent values.
"""

import difflib
import importlib.util
import itertools
import logging
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jobs.config.evaluation import LmEval
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.subject import Subject, memory_bytes, read_config, read_tokenizer, weights_bytes
from jobs.measures.result import Point, Result, Table
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

ROWS = 8  # of inputs that fit the local context, read together
RESAMPLES = 1000  # for the standard errors of metrics that are no means
TITLE = "lm-evaluation-harness: base and model"


def check(settings: LmEval) -> None:
    """Raises UserError where the harness or a task is not there, whatever the model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation.lm_eval: the lm-evaluation-harness is not installed: pip install 'fot[lm_eval]'")
    if settings.include is not None and not Path(settings.include).is_dir():
        raise UserError(f"evaluation.lm_eval.include: {settings.include} is no directory")
    with quiet():
        known = task_manager(settings, "").all_tasks
    for task in settings.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 5, 0.5)
            raise UserError(
                f"evaluation.lm_eval.tasks: the harness has no {task!r}: "
                + (f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists what it has")
            )


def cells(subject: Subject, settings: LmEval) -> list[Cell]:
    """One for each task and model, base first. Loads all data sets, so that what is missing is said at once.

    Raises UserError where the harness, a task, its packages or its data are not there.
    """
    check(settings)
    for path in subject.models.values():
        read_tokenizer(path)
    loaded = {task: _load(subject, settings, task) for task in settings.tasks}
    return [
        Cell(
            key=f"{task.replace('/', '-')}-{who}",
            function=run_task,
            arguments=(subject, settings, task, who),
            tokens=loaded[task].examples * subject.local,
            bytes=weights_bytes(subject.models[who], subject.dtype)
            + _reading_bytes(subject, who, loaded[task].longest),
            weights=weights_bytes(subject.models[who], subject.dtype),
            what=f"lm_eval task {task} with prompts of {loaded[task].longest} tokens",
        )
        for task in settings.tasks
        for who in sorted(subject.models)
    ]


def run_task(subject: Subject, settings: LmEval, task: str, who: str) -> Json:
    """In a task: {task: {metric: {"value", "error", "examples"}}}, also of the tasks in a group. `examples`: the values
    whose mean the metric is, else null."""
    import lm_eval

    from jobs.evaluate.harness import FotLM

    os.environ["DISABLE_MULTIPROC"] = "1"  # resampling stays in this process
    with quiet():
        output = lm_eval.simple_evaluate(
            model=FotLM(subject.models[who], subject.local, subject.model, subject.memory, ROWS, subject.dtype),
            tasks=[task],
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            task_manager=task_manager(settings, str(subject.model)),
            random_seed=subject.seed,
            numpy_random_seed=subject.seed,
            torch_random_seed=subject.seed,
            fewshot_random_seed=subject.seed,
        )
    return {
        name: _read_metrics(metrics, output["samples"].get(name, ())) for name, metrics in output["results"].items()
    }


def summarize(subject: Subject, settings: LmEval, results: Mapping[str, Json], output: Path) -> Result:
    """A row for each task and metric; the first metric of each is a point, those that RULER names by their length are
    one each."""
    found: dict[str, dict[str, Json]] = {who: {} for who in sorted(subject.models)}
    for key, tasks in results.items():
        found[key.rsplit("-", 1)[1]] |= tasks
    points, rows = [], []
    for task, metrics in found["model"].items():
        for number, (metric, mine) in enumerate(metrics.items()):
            name = metric.split(",")[0]
            theirs = found["base"][task][metric] if "base" in found else None
            if name.isdigit() or number == 0:
                step = int(name) if name.isdigit() else 0
                points += [Point(f"lm_eval/{task}/{who}", step, found[who][task][metric]["value"]) for who in found]
            rows.append([task, metric.removesuffix(",none"), *compare(theirs, mine)])
    columns = ["task", "metric", "base", "model", "difference", "standard error"]
    shown = "" if settings.limit is None else f"the first {settings.limit} examples of each task"
    table = Table(TITLE, columns, rows, shown)
    return Result("lm_eval", settings.model_dump(mode="json"), points, [table])


def compare(base: Json | None, model: Json) -> tuple[float | None, float, float | None, float | None]:
    """Base, model, the difference and its standard error, None for what there is not."""
    if base is None:
        return None, model["value"], None, None
    error = None
    if base["examples"] and model["examples"] and len(base["examples"]) > 1:
        differences = [m - b for m, b in zip(model["examples"], base["examples"], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    elif base["error"] is not None and model["error"] is not None:
        error = math.hypot(base["error"], model["error"])
    return base["value"], model["value"], model["value"] - base["value"], error


@lru_cache(maxsize=2)
def task_manager(settings: LmEval, tokenizer: str) -> Any:
    """The harness's tasks: one's own alone where all are found there, because to index all takes seconds."""
    from lm_eval.tasks import TaskManager

    about = {"tokenizer": tokenizer, "max_seq_lengths": list(settings.lengths)}  # for RULER
    if settings.include is not None:
        own = TaskManager(include_path=settings.include, include_defaults=False, metadata=about)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=settings.include, metadata=about)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and bars of the harness, of its tasks and of what downloads their data."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


class Loaded(NamedTuple):
    """Of a task, or of the tasks in a group: examples asked, and about the tokens of the longest prompt."""

    examples: int
    longest: int


def _load(subject: Subject, settings: LmEval, task: str) -> Loaded:
    """Loads the task. Raises UserError where that cannot be done."""
    say(f"lm_eval: loading {task}")
    encode = read_tokenizer(subject.model).encoder
    with quiet():
        manager = task_manager(settings, str(subject.model))
        try:
            examples, longest = 0, 0
            for each in manager.load([task])["tasks"].values():
                asked = list(itertools.islice(each.eval_docs, settings.limit))
                texts = [f"{each.doc_to_text(doc)} {each.doc_to_target(doc)}" for doc in asked]
                shots = each.config.num_fewshot if settings.few_shot is None else settings.few_shot
                examples += len(asked)
                longest = max(longest, (1 + (shots or 0)) * max(map(len, encode(texts)), default=0))
        except ImportError as error:
            raise UserError(
                f"lm_eval task {task} needs packages that are not installed: {' '.join(str(error).split())}"
            ) from None
        except Exception as error:
            raise UserError(
                f"lm_eval task {task}: its data set {_data_set(manager, task)} cannot be loaded "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): without network set HF_HOME to a "
                f"cache that holds it, or name tasks of local files by evaluation.lm_eval.include"
            ) from error
    return Loaded(examples, longest)


def _reading_bytes(subject: Subject, who: str, longest: int) -> int:
    """Memory of what goes beyond the local context, and logits of a full one: of all rows, and of one in float32."""
    local = subject.local
    tokens = 0 if longest <= local else longest
    logits = read_config(subject.models[who])["vocab_size"] * local * (4 * ROWS + 8)
    return memory_bytes(subject.model, subject.memory, tokens, local - local // 2, dtype=subject.dtype) + logits


def _data_set(manager: Any, task: str) -> str:
    """The name of a task's data set, as far as its file says it; of a group its own name."""
    return str((manager.task_index[task].cfg or {}).get("dataset_path") or task)


def _read_metrics(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Json:
    """{metric: {"value", "error", "examples"}} of the harness's results; what it did not measure is left out."""
    read = {}
    for metric, value in metrics.items():
        name, _, kept = metric.partition(",")
        if not kept or name.endswith("_stderr") or not isinstance(value, int | float) or (name.isdigit() and value < 0):
            continue
        error = metrics.get(f"{name}_stderr,{kept}")
        ordered = sorted((sample for sample in samples if sample["filter"] == kept), key=lambda one: one["doc_id"])
        each = [float(one) for sample in ordered if isinstance(one := sample.get(name), int | float)]
        is_mean = len(each) == len(ordered) > 0 and math.isclose(statistics.fmean(each), value, abs_tol=1e-12)
        read[metric] = {
            "value": float(value),
            "error": float(error) if isinstance(error, int | float) else None,
            "examples": each if is_mean else None,
        }
    return read
