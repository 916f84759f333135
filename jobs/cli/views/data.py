"""What people see of a data set: lines of text, made from its report, its batches and their plan."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.common.terminal import table
from jobs.config.training import Objective
from jobs.train.objective import plan_of
from pipelines.batches.index import REPORT
from pipelines.batches.sampler import CrossBatchSampler, MicroBatch
from pipelines.config import Source
from pipelines.tokens.shards import Manifest
from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.progress import human

BAR = 40  # characters of the longest bar of a histogram
NAMES = 80  # characters shown of a list of names
EXCERPT = 50  # characters shown of either end of a piece


def source_view(documents: Path, sources: Sequence[Source]) -> Iterator[str]:
    """Table of sources and a histogram of document lengths; what is made up is said to be."""
    synthetic = {source.name for source in sources if source.recall is not None}
    report = json.loads((documents / REPORT).read_text())
    header = ("source", "documents", "tokens", "chars/token", "training", "held out", "duplicates")
    rows = []
    for name, source in report.items():
        per_token = source["characters"] / max(1, source["tokens"])
        uses = [human(source["uses"][use][0]) for use in ("training", "held out")]
        counts = human(source["documents"]), human(source["tokens"]), f"{per_token:.2f}"
        label = f"{name} (synthetic)" if name in synthetic else name
        rows.append((label, *counts, *uses, human(source["duplicates"])))
    yield from table(header, rows)
    for name, source in report.items():
        copies = {use: count for use, (count, _) in source["uses"].items() if use not in ("training", "held out")}
        for reason, count in (source["dropped"] | copies).items():
            if count:
                yield f"{name}: {human(count)} left out ({reason})"
    yield ""
    lengths: Counter[int] = Counter()
    for source in report.values():
        lengths.update({int(least): count for least, count in source["lengths"].items()})
    yield "document lengths in tokens"
    for least in sorted(lengths):
        bar = "#" * -(-BAR * lengths[least] // max(lengths.values()))
        yield f"{human(least):>8} to {human(2 * least):<8} {lengths[least]:>9}  {bar}"


def licence_view(manifest: Manifest) -> Iterator[str]:
    """The licences of the installed packages that were read, as their metadata says, and which packages."""
    yield "licences of installed packages"
    for licence, packages in manifest.licences.items():
        names = textwrap.shorten(", ".join(packages), NAMES, placeholder=" ...")
        yield f"  {len(packages):>4}  {licence}: {names}"


def training_view(sampler: CrossBatchSampler, name: str, last: int) -> Iterator[str]:
    """What a training reads of each source until its last step."""
    shape, steps = sampler.shape, last - sampler.first
    epochs = sampler.epochs(steps)
    groups_of = f"groups of {shape.contexts_per_group} x {shape.context}"
    yield f"{name}: {steps} steps of {human(shape.tokens_per_step)} tokens, in {groups_of}"
    header = ("source", "groups", "documents a group", "tokens used", "left over", "epochs")
    yield from table(
        header,
        [
            (
                source.name,
                human(len(groups)),
                f"{len(groups.document) / max(1, len(groups)):.2f}",
                f"{1 - groups.dropped / max(1, groups.dropped + len(groups) * shape.group_tokens):.2%}",
                human(groups.dropped),
                f"{epochs[source.name]:.2f}",
            )
            for source, groups in zip(sampler.sources, sampler.groups, strict=True)
        ],
    )


def sample_view(sampler: CrossBatchSampler, tokenizer: TextTokenizer, count: int) -> Iterator[str]:
    """A few groups of the first micro-batch, decoded: each context's beginning and end, documents marked."""
    numbers = sampler.group_numbers(sampler.first, 0)[:count]
    context = sampler.shape.context
    for source, number in numbers:
        yield f"sample: group {number} of {sampler.sources[source].name}"
        at = 0
        for document, start, length in sampler.groups[source].pieces(number):
            rows = f"{at // context} to {(at + length - 1) // context}"
            whole = int(sampler.dataset.length[document])
            yield f"  contexts {rows}: {sampler.dataset.id(document)}, tokens {start} to {start + length} of {whole}"
            tokens = sampler.dataset.tokens(document, start, start + length).tolist()
            text = tokenizer.tokenizer.decode(tokens, skip_special_tokens=False)
            yield f"    {excerpt(text)}"
            at += length


def excerpt(text: str) -> str:
    """Both ends of a text on one line."""
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return line if len(line) <= 2 * EXCERPT else f"{line[:EXCERPT]} ... {line[-EXCERPT:]}"


def plan_view(batch: MicroBatch, objective: Objective, step: int, seed: int) -> Iterator[str]:
    """The plan of a step's micro-batch as a grid: which row (line) sees which other (column)."""
    yield "plan of the first micro-batch (a line a context: L itself, P positive, N negative, . unseen)"
    plan = _seen(objective, batch, step, seed)
    for row, seen in enumerate(plan):
        marks = ["."] * len(plan)
        marks[row] = "L"
        for other in seen:
            marks[other] = "P" if batch.group[other] == batch.group[row] else "N"
        yield f"  {row:>4} {''.join(marks)}  group {batch.group[row]}, segment {batch.segment[row]}"


def batch_view(sampler: CrossBatchSampler, objective: Objective, step: int, seed: int) -> Iterator[str]:
    """Every row of a step with its documents, and the rows that serve it as positives and negatives with theirs."""
    shape = sampler.shape
    batches = [sampler.micro_batch(step, number) for number in range(shape.micro_batches)]
    counts = Counter(source for batch in batches for source in batch.sources)
    groups = ", ".join(f"{source.name} {counts[source.name]}" for source in sampler.sources)
    of = f"{shape.contexts_per_group} x {shape.context} tokens"
    yield f"step {step}: {shape.groups_per_step} groups of {of}; {groups}"
    names: dict[int, str] = {}

    def held(batch: MicroBatch, row: int) -> str:
        for document in batch.documents[row]:
            names.setdefault(document, sampler.dataset.id(document))
        return " + ".join(names[document] for document in batch.documents[row])

    for number, batch in enumerate(batches):
        yield f"micro-batch {number}"
        for row, seen in enumerate(_seen(objective, batch, step, seed)):
            yield f"  row {row} (group {batch.group[row]}, segment {batch.segment[row]}): {held(batch, row)}"
            for other in seen:
                kind = "positive" if batch.group[other] == batch.group[row] else "negative"
                yield f"    {kind}: row {other}, {held(batch, other)}"


def _seen(objective: Objective, batch: MicroBatch, step: int, seed: int) -> list[list[int]]:
    """The rows that each row sees besides itself."""
    plan = plan_of(objective, batch, step, seed)
    return [[] for _ in batch.group] if plan is None else [[row for row in seen if row >= 0] for seen in plan.tolist()]
