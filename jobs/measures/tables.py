"""Results as tables in the terminal."""

from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from jobs.common.terminal import plain
from jobs.measures.result import Result, Value
from pipelines.workflow.progress import console


def print_results(results: Iterable[tuple[Result, Path]]) -> None:
    """Every table of every result."""
    for result, _ in results:
        for table in result.tables:
            view = Table(*map(plain, table.columns), title=plain(table.title), caption=plain(table.note) or None)
            for row in table.rows:
                view.add_row(*(plain(shown(cell)) for cell in row))
            for column in view.columns[1:]:
                column.justify = "right"
            console.print(view)


def shown(cell: Value) -> str:
    """A cell of a table as text: 16384 -> '16,384', 8.29712 -> '8.297', None -> '-'."""
    match cell:
        case None:
            return "-"
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.3f}" if abs(cell) >= 0.0005 or cell == 0 else f"{cell:.2g}"
        case _:
            return cell
