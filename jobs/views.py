"""Results in the terminal."""

from collections.abc import Iterable
from pathlib import Path

from rich.markup import escape
from rich.table import Table as Shown

from jobs.evaluate.result import Result
from jobs.report import shown
from pipelines.progress import console


def print_results(results: Iterable[tuple[Result, Path]]) -> None:
    """Every table of every result."""
    for result, _ in results:
        for table in result.tables:
            columns = [escape(column) for column in table.columns]
            view = Shown(*columns, title=escape(table.title), caption=escape(table.note) or None)
            for row in table.rows:
                view.add_row(*(escape(shown(cell)) for cell in row))
            for column in view.columns[1:]:
                column.justify = "right"
            console.print(view)
