"""Question sets: records in a file or at a URL, as JSON lines or Parquet, as they are or compressed."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipelines.sources.formats import suffix_and_codec
from pipelines.sources.storage import open_decompressed, printable, readable, storage_of
from pipelines.sources.tables import name_some
from pipelines.workflow.errors import UserError


@dataclass(frozen=True)
class Example:
    """A question and what answers it: any of these is right, the first is shown in demonstrations."""

    question: str
    answers: tuple[str, ...]


def read_examples(path: str, setting: str, questions: Sequence[str], answers: Sequence[str]) -> list[Example]:
    """All examples. `questions`, `answers`: names that their columns may have; `setting`: of the recipe, that gave the
    path, for errors.

    Raises UserError for what is not there, cannot be read, holds nothing or other things.
    """
    found = storage_of(path).info(path)
    if found is None or found.directory:
        problem = "does not exist" if found is None else "is a directory"
        raise UserError(f"{printable(path)} {problem}: set {setting} to a file or URL of JSON lines or Parquet")
    with readable(path), open_decompressed(path) as stream:
        content = stream.read()
        parquet = suffix_and_codec(path)[0] == ".parquet"
        examples = []
        for number, record in _rows(content, path) if parquet else _lines(content, path):
            where = f"{printable(path)}, {'row' if parquet else 'line'} {number}"
            question, given = (_find(record, names, where) for names in (questions, answers))
            accepted = tuple(map(str, given)) if isinstance(given, list) else (str(given),)
            if not (isinstance(question, str) and question.strip() and accepted and all(map(str.strip, accepted))):
                raise UserError(f"{where}: the question or its answer is empty: mend or remove it")
            examples.append(Example(" ".join(question.split()), tuple(" ".join(text.split()) for text in accepted)))
    if not examples:
        raise UserError(f"{printable(path)} holds no questions: check {setting}")
    return examples


def _lines(content: bytes, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, record)."""
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{printable(path)}, line {number}: it is no JSON object: give JSON lines or .parquet")
            yield number, record


def _rows(content: bytes, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 0, record); integers of classes as the names that the hub writes beside them. Raises UserError for
    integers without a name, such as the -1 of what nobody labelled."""
    table = pq.read_table(io.BytesIO(content))
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    names = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    for number, record in enumerate(table.to_pylist()):
        for column in names:
            if (label := record.get(column)) is None:
                continue
            if not 0 <= label < len(names[column]):
                raise UserError(f"{printable(path)}, row {number}: {column} {label} names no class: label or remove it")
            record[column] = names[column][label]
        yield number, record


def _find(record: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    wanted = " or ".join(map(repr, names))
    raise UserError(f"{where}: there is no {wanted}, its columns are {name_some(list(record))}")
