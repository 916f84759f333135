"""The evaluations by name. Each is a module with two functions: `cells(subject, settings)`, what is to be measured,
which raises UserError at once for what cannot be; and `summarize(subject, settings, results, output)`, which makes the
Result of the cells' results and draws its plots into `output`. Those of plugins (docs/plugins.md) also have
`Settings`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.config.evaluation import evaluation_plugins, load_evaluation
from jobs.evaluate.cells import Cell, Json, run_cells
from jobs.evaluate.subject import Subject
from jobs.measures.result import Result
from pipelines.workflow.errors import UserError

MODULES = {
    "perplexity": "perplexity",
    "passkey": "passkey",
    "attention_mass": "attention_mass",
    "dictionary": "dictionary.cells",
    "trec": "trec",
    "webquestions": "webquestions",
    "lm_eval": "lm_eval_tasks",
}
READ_DOCUMENTS = frozenset({"perplexity", "attention_mass"})  # of ours, those of the data set
NEED_NO_TOKENIZER = frozenset({"dictionary"})
SEE_BASE = frozenset({"perplexity", "lm_eval"})  # beside the model


@dataclass(frozen=True)
class Task:
    cells: Callable[[Subject, Any], list[Cell]]
    summarize: Callable[[Subject, Any, Mapping[str, Json], Path], Result]


def check_installed(rivals: Collection[str]) -> None:
    """Raises UserError where a rival needs a package that is not there."""
    if "bm25" in rivals and find_spec("bm25s") is None:
        raise UserError("the rival bm25 needs bm25s: pip install 'fot[bm25]'")


def find_task(name: str) -> Task:
    module = import_module(f"jobs.evaluate.{MODULES[name]}") if name in MODULES else _plugin(name)
    return Task(module.cells, module.summarize)


def task_names() -> list[str]:
    """Ours and those of plugins."""
    return [*MODULES, *evaluation_plugins()]


def reads_documents(name: str) -> bool:
    """Whether a task reads those of the data set."""
    return name in READ_DOCUMENTS if name in MODULES else bool(getattr(_plugin(name), "reads_documents", False))


def plugin_version(name: str) -> str | None:
    """The distribution and version that a task comes with, if it is not ours."""
    return None if name in MODULES else evaluation_plugins()[name].made_by


def _plugin(name: str) -> Any:
    return load_evaluation(evaluation_plugins()[name])


def evaluate(name: str, subject: Subject, settings: Any, output: Path) -> Result:
    """Measure, and write the result and its plots into `output`. Raises UserError for what cannot be measured."""
    task = find_task(name)
    results = run_cells(name, task.cells(subject, settings), output)
    result = task.summarize(subject, settings, results, output)
    result.write(output)
    return result
