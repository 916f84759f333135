"""Dictionary lookup of a model that was trained on that task (train.py), with dictionaries of its own.

A cell is a seed's dictionary: one memory grows through all sizes, so these are not apart.
"""

from collections.abc import Mapping
from pathlib import Path

from fot_model import FotLlamaConfig
from jobs.config.dictionary import DictionaryEvaluation
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.dictionary.accuracy import accuracy, check_memory, memory_size
from jobs.evaluate.dictionary.result import dictionary_result
from jobs.evaluate.dictionary.task import VOCABULARY
from jobs.evaluate.subject import Subject, weights_bytes
from jobs.measures.result import Result
from pipelines.workflow.errors import UserError

DICTIONARIES = 3


def cells(subject: Subject, settings: DictionaryEvaluation) -> list[Cell]:
    """One for each dictionary. Raises UserError for a model that does not know the task, and for too large a memory."""
    config = FotLlamaConfig.from_pretrained(subject.model)
    if config.vocab_size != VOCABULARY or not config.mem_layers:
        raise UserError(
            f"dictionary: {subject.model} was not trained on it (it has {config.vocab_size} tokens, the task "
            f"{VOCABULARY}): `fot run recipes/dictionary.yaml` makes a model that was"
        )
    check_memory(config, settings)
    largest = max(settings.tokens)
    held = 3 * memory_size(config, settings) // 2 + weights_bytes(subject.model)  # and half of it, copied as it grows
    return [
        Cell(
            key=f"dictionary-{seed}",
            function=accuracy,
            arguments=(subject.model, settings, seed),
            keeps=True,
            tokens=largest,
            bytes=held,
            weights=weights_bytes(subject.model),
            what=f"a dictionary of {largest} tokens",
        )
        for seed in range(subject.seed, subject.seed + DICTIONARIES)
    ]


def summarize(subject: Subject, settings: DictionaryEvaluation, results: Mapping[str, Json], output: Path) -> Result:
    """Accuracy by size, the median of the dictionaries."""
    by_seed = {int(key.removeprefix("dictionary-")): result for key, result in results.items()}
    return dictionary_result(by_seed, settings, {}, output)
