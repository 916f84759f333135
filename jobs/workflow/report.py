"""A run on one page: what it is, its tables and plots, what it came from. HTML that needs no other file."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jobs.measures.result import Result, Table
from jobs.measures.tables import shown
from pipelines.workflow.files import write_atomically
from pipelines.workflow.visible import visible

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem } .note { color: #555; margin: .3rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #e5e5e5; text-align: right }
th:first-child, td:first-child { text-align: left }
dt { color: #555 } dd { margin: 0 0 .4rem 1rem; word-break: break-all }
img { max-width: 100%; margin: 1rem 0 } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def write_report(
    target: Path,
    title: str,
    facts: Mapping[str, str],
    results: Iterable[tuple[Result, Path]],
    texts: Mapping[str, str],
) -> None:
    """`facts`: what to know first, by name. `results`: each with the directory of its plots. `texts`: long ones, shown
    folded, by title (the recipe, the lineage)."""
    body = [f"<h1>{_text(title)}</h1>", "<dl>"]
    body += [f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()]
    body.append("</dl>")
    for result, directory in results:
        body += _section(result, directory)
    for name, text in texts.items():
        body.append(f"<details><summary>{_text(name)}</summary><pre>{html.escape(_lines(text))}</pre></details>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_atomically(target, page.encode())


def _text(text: str) -> str:
    return html.escape(visible(text))


def _lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def _section(result: Result, directory: Path) -> Iterator[str]:
    yield f"<h2>{_text(result.task.replace('_', ' '))}</h2>"
    for table in result.tables:
        yield from _table(table)
    for plot in result.plots:
        encoded = base64.b64encode((directory / plot).read_bytes()).decode()
        yield f'<img alt="{_text(plot)}" src="data:image/png;base64,{encoded}">'


def _table(table: Table) -> Iterator[str]:
    yield f"<h3>{_text(table.title)}</h3>"
    if table.note:
        yield f'<p class="note">{_text(table.note)}</p>'
    yield f'<div class="wide"><table><tr>{_cells("th", table.columns)}</tr>'
    for row in table.rows:
        yield f"<tr>{_cells('td', [shown(cell) for cell in row])}</tr>"
    yield "</table></div>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{_text(text)}</{tag}>" for text in texts)
