"""The registry in the terminal."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.common.terminal import number, sparkline
from jobs.registry.runs import RunFacts

Metrics = Mapping[str, Mapping[int, float]]
FILES = 5  # of a source that are named
LINEAGE = ("tokenizer", "shards", "index", "documents", "base-groups", "finetune-groups", "base", "finetune")


def list_rows(runs: Sequence[RunFacts]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and a row a run."""
    header = ("run", "experiment", "name", "kind", "status", "start", "last metrics", "model")
    return header, [
        (
            run.run_id[:8],
            run.experiment,
            run.name,
            run.kind,
            run.status.lower(),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.start / 1000)),
            ", ".join(f"{name} {value:.4g} at {step}" for name, (step, value) in run.latest.items()),
            run.model,
        )
        for run in runs
    ]


def metric_rows(metrics: Metrics, runs: Sequence[Metrics] = ()) -> list[Sequence[str]]:
    """A row a metric and step of `metrics`, with a column more, and the difference, for every other run."""
    rows: list[Sequence[str]] = []
    for name in sorted({name for each in (metrics, *runs) for name in each}):
        for step in sorted({step for each in (metrics, *runs) for step in each.get(name, {})}):
            first = metrics.get(name, {}).get(step)
            cells = [number(first)]
            for run in runs:
                value = run.get(name, {}).get(step)
                difference = "" if value is None or first is None else f" ({value - first:+.4g})"
                cells.append(number(value) + difference)
            rows.append((name, str(step), *cells))
    return rows


def curve(history: Mapping[int, float]) -> str:
    """A sparkline with its ends: '▇▅▂▁ 4.2 to 1.3, steps 1 to 400'."""
    steps = sorted(history)
    if not steps:
        return "-"
    ends = f"{history[steps[0]]:.4g} to {history[steps[-1]]:.4g}, {steps[0]} to {steps[-1]}"
    return f"{sparkline([history[step] for step in steps])} {ends}"


def differing(params: Sequence[Mapping[str, str]]) -> list[Sequence[str]]:
    """The parameters that are not the same in all runs."""
    names = sorted({name for each in params for name in each})
    rows = [(name, *(each.get(name, "-") for each in params)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def lineage_lines(lineage: Mapping[str, Any], recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    """From the raw files to the model and what was measured of it, a stage a line, each with what it read.

    `lineage`: the stages' records by name; `recipe`: with the paths of the sources; `manifest`: the data set's, {}
    where it is not at hand.
    """
    paths = {source["name"]: source["path"] for source in recipe.get("data", {}).get("sources", ())}
    files: dict[str, dict[str, str]] = {name: {} for name in paths}
    for shard in manifest.get("shards", ()):
        for _, parts, *_ in shard["unit"]["entries"]:
            files.setdefault(shard["unit"]["source"], {}).update(dict(parts))
    for name, path in paths.items():
        yield f"source {name}: {path}" + (f", {len(files[name])} files" if files[name] else "")
        for file, content in sorted(files[name].items())[:FILES]:
            yield f"  {file}  {str(content)[:16]}"
        if len(files[name]) > FILES:
            yield f"  and {len(files[name]) - FILES} more"
    known = [stage for stage in LINEAGE if stage in lineage]
    for stage in [*known, *(stage for stage in lineage if stage not in known)]:
        record = lineage[stage]
        read = ", ".join(f"{name} {key}" for name, key in record["inputs"].items())
        origin = f" from {record['params']['path']}" if stage == "base" and "path" in record["params"] else ""
        yield f"{stage} {record['key']}{origin}: {len(record['files'])} files" + (f"; of {read}" if read else "")
