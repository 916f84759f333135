"""Tables and sparklines in the terminal; plain columns where nobody sees one."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.workflow.visible import visible

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a sparkline, in characters


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On standard output."""
    terminal = Console(highlight=False)
    if not terminal.is_terminal:
        print(*([title] if title else []), *table(header, rows), sep="\n")
        return
    view = Table(*map(plain, header), title=plain(title) or None, title_justify="left")
    for row in rows:
        view.add_row(*map(plain, row))
    terminal.print(view)


def print_lines(lines: Iterable[str]) -> None:
    """On standard output; what names and ids in them hold does nothing to the terminal."""
    for line in lines:
        print(visible(line))


def plain(text: str) -> str:
    """As rich is to show it."""
    return escape(visible(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need, the first to the left, numbers to the right."""
    header, rows = [visible(cell) for cell in header], [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *numbers])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def sparkline(values: Sequence[float]) -> str:
    """A line of blocks, the highest value the highest; longer rows as means."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    cuts = [round(place * len(values) / min(WIDTH, len(values))) for place in range(min(WIDTH, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((mean - low) / (high - low or 1) * (len(BLOCKS) - 1))] for mean in means)
