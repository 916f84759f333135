"""Perplexity by context length, and bits per byte, of held-out documents.

A window is L consecutive tokens (the local context). Two modes:

- `last_window`: at context c x L the c - 1 windows before it are read into an empty memory, one after the other, and
  then the window is scored: the same tokens at every length, so that lengths differ in context alone.
- `whole_document`: the first c x L tokens of a document are scored, window by window, with all before in memory, which
  is emptied for the next document.

`others` adds the paper's multi-document setting: before the longest context of a window's own document, whole windows
of other documents are read into the same memory. All sums are over tokens, so long documents weigh more. Logits are
made of scored windows alone.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from jobs.common.plot import plot_curves
from jobs.config.evaluation import Perplexity
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.losses import Scored, Sums, at_steps, curve_of, difference, perplexity, write_losses
from jobs.evaluate.readers import check_reading, held_bytes, open_reader, rows_together
from jobs.evaluate.subject import (
    Subject,
    check_tokenizer,
    is_chained,
    load_model,
    new_cache,
    open_documents,
    read_config,
    read_into,
    read_tokenizer,
    weights_bytes,
)
from jobs.evaluate.text_bytes import prefix_bytes, token_bytes
from jobs.measures.result import Point, Result, Table, Value
from jobs.measures.scoring import score
from jobs.measures.windows import (
    Window,
    choose_documents,
    choose_windows,
    fewest_others,
    one_after_another,
    other_documents,
    read_contexts,
    read_windows,
    source_names,
)
from pipelines.batches.dataset import TokenDataset
from pipelines.workflow.errors import UserError

TOKENS_AT_ONCE = 4096  # scored together: bounds the logits
TOKENS_A_CELL = 2**16  # read by a cell, where a single window does not need more
CONTEXTS = "evaluation.perplexity.contexts"
DISTRACTED = "model/distracted"
TOKENS, PERPLEXITY = "tokens of context", "perplexity a token"
Item = TypeVar("Item")


class ScoredRows(NamedTuple):
    """Windows that end `context` windows of reading, the last `scored` of which are scored."""

    context: int
    windows: list[Window]
    scored: int


Part = tuple[list[Point], list[Table], list[str]]  # of a Result


def cells(subject: Subject, settings: Perplexity) -> list[Cell]:
    """Batches of windows by model and context; then those of the multi-document setting, the model's alone.

    Raises UserError where documents are too short or too few, or of another tokenizer than the model's.
    """
    dataset, local = open_documents(subject), subject.local
    if is_chained(subject.model) and (settings.others or settings.mode == "whole_document"):
        raise UserError("evaluation.perplexity: a Transformer-XL has no memory: set mode: last_window and others: []")
    check_tokenizer(subject, dataset)
    check_documents(dataset, local, settings)
    check_reading(subject)
    batches, made = _batches(dataset, subject, settings), []
    for name in subject.models:
        for batch in batches:
            tokens = batch.context * local
            cell = Cell(
                key=_key(name, batch),
                function=score_batch,
                arguments=(subject, name, batch),
                tokens=len(batch.windows) * tokens,
                bytes=_bytes(subject, name, min(len(batch.windows), _at_once(subject, name, tokens)), tokens),
                weights=weights_bytes(subject.models[name], subject.dtype),
                what=f"perplexity with {tokens} tokens of context",
            )
            made.append(cell)
    longest = max(settings.contexts)
    for amount, windows in _distracted(dataset, subject.local, settings):
        cell = Cell(
            key=_distracted_key(amount, windows),
            function=score_distracted,
            arguments=(subject, windows, longest, amount),
            tokens=(amount + len(windows) * longest) * local,
            bytes=_bytes(subject, "model", 1, (amount + longest) * local),
            weights=weights_bytes(subject.model, subject.dtype),
            what=f"perplexity with {(amount + longest) * local} tokens in memory",
        )
        made.append(cell)
    return made


def check_documents(dataset: TokenDataset, local: int, settings: Perplexity) -> None:
    """Raises UserError where held-out documents are too short or too few."""
    windows = choose_windows(dataset, local, max(settings.contexts), settings.windows, CONTEXTS)
    wanted = max(settings.others, default=0)
    if wanted and (there := fewest_others(dataset, windows, local)) < wanted:
        raise UserError(
            f"evaluation.perplexity.others: {wanted} local contexts of other held-out documents are asked for, there "
            f"are {there} of {local} tokens: lower it to at most {there}, or hold out more documents"
        )


def score_batch(subject: Subject, name: str, batch: ScoredRows) -> Json:
    """A cell: loss (nats) of every scored window, a list for each of the batch's; nothing was read before each."""
    reader, dataset, local = open_reader(subject, name), open_documents(subject), subject.local
    found = []
    for windows in _split(batch.windows, _at_once(subject, name, batch.context * local)):
        text_BT = torch.from_numpy(read_contexts(dataset, windows, batch.context, local))
        found += reader.losses(text_BT, batch.scored).tolist()
    return found


def score_distracted(subject: Subject, windows: list[Window], context: int, amount: int) -> Json:
    """A cell: loss (nats) of windows of one document, with `amount` local contexts of others before its own `context`.

    The others are read once; each window goes on from there.
    """
    model, dataset, local = (
        load_model(subject.model, subject.model, subject.dtype),
        open_documents(subject),
        subject.local,
    )
    own, cache = windows[0].document, new_cache(model, subject.memory)
    seed = f"{subject.seed}/others/{dataset.id(own)}"
    for other in islice(one_after_another(dataset, other_documents(dataset, own, local), local, seed), amount):
        read_into(model, cache, torch.from_numpy(read_windows(dataset, [other], local)), local)
    found = []
    for window in windows:
        cache.truncate(amount * local)
        text_1T = torch.from_numpy(read_contexts(dataset, [window], context, local))
        found.append(score(model, text_1T, local, model.device, cache).item())
    return found


def summarize(subject: Subject, settings: Perplexity, results: Mapping[str, Json], output: Path) -> Result:
    """Perplexity and bits a byte in all and by source, and what other documents in memory cost."""
    dataset = open_documents(subject)
    scored = scored_windows(dataset, subject, settings, results)
    write_losses(scored, output)
    names = [name for name in ("base", "model") if name in subject.models]
    parts = [_in_all(names, scored, _what(dataset, subject, settings), output)]
    sources = [source for source in source_names(dataset.manifest) if any(one.source == source for one in scored)]
    if len(sources) > 1:
        parts.append(_by_source(names, sources, scored, output))
    if settings.others:
        parts.append(_beside_others(scored, output))
    points, tables, plots = zip(*parts, strict=True)
    joined = (list(chain(*each)) for each in (points, tables, plots))
    return Result("perplexity", settings.model_dump(mode="json"), *joined)


def scored_windows(
    dataset: TokenDataset, subject: Subject, settings: Perplexity, results: Mapping[str, Json]
) -> list[Scored]:
    """Every scored window at every length."""
    tokenizer, sources, local = read_tokenizer(subject.model), source_names(dataset.manifest), subject.local
    sizes, prefix = token_bytes(tokenizer), prefix_bytes(tokenizer)

    def one(name: str, context: int, window: Window, nats: float) -> Scored:
        labels = dataset.tokens(window.document, window.start + 1, window.start + local + 1)
        text = int(sizes[labels].sum()) - (prefix if window.start == 0 else 0)
        source = sources[int(dataset.source[window.document])]
        return Scored(name, source, int(window.document), int(window.start), context * local, Sums(nats, local, text))

    found = []
    for batch in _batches(dataset, subject, settings):
        for name in subject.models:
            for window, losses in zip(batch.windows, results[_key(name, batch)], strict=True):
                if settings.mode == "last_window":
                    found.append(one(name, batch.context, window, losses[0]))
                    continue
                for place, nats in enumerate(losses):
                    here = Window(window.document, place * local)
                    reached = [context for context in set(settings.contexts) if place < context <= batch.context]
                    found += [one(name, context, here, nats) for context in reached]
    for amount, windows in _distracted(dataset, subject.local, settings):
        for window, nats in zip(windows, results[_distracted_key(amount, windows)], strict=True):
            found.append(one(DISTRACTED, amount, window, nats))
    return found


def _in_all(names: Sequence[str], scored: list[Scored], what: str, output: Path) -> Part:
    windows = {name: at_steps(scored, name) for name in names}
    curves = {name: curve_of(scored, name) for name in names}
    rows: list[list[Value]] = []
    for step in curves["model"]:
        row: list[Value] = [step]
        row += [curves[name][step].perplexity for name in names]
        row += [curves[name][step].bits_per_byte for name in names]
        row += [perplexity(windows[name][step]).ends for name in names]
        if "base" in names:
            row.append(str(difference(windows["model"][step], windows["base"][step])))
        rows.append(row)
    columns = [
        "tokens of context",
        *(f"perplexity, {name}" for name in names),
        *(f"bits a byte, {name}" for name in names),
        *(f"interval, {name}" for name in names),
        *(["model less base, nats"] if "base" in names else []),
    ]
    points = _points(curves) + [
        Point(f"bits_per_byte/{name}", step, sums.bits_per_byte)
        for name in names
        for step, sums in curves[name].items()
    ]
    plot_curves(_perplexities(curves), TOKENS, f"{PERPLEXITY}, held-out documents", output / "perplexity.png")
    note = f"{what} Intervals of perplexity, 95 %, over documents."
    return points, [Table("Perplexity by context length", columns, rows, note)], ["perplexity.png"]


def _by_source(names: Sequence[str], sources: Sequence[str], scored: list[Scored], output: Path) -> Part:
    windows = {(source, name): at_steps(scored, name, source) for name in names for source in sources}
    curves = {f"{name}/{source}": curve_of(scored, name, source) for name in names for source in sources}
    steps = list(at_steps(scored, "model"))
    rows: list[list[Value]] = []
    for (source, name), own in windows.items():
        tokens = sum(one.sums.tokens for one in own[steps[0]])
        rows.append([source, name, tokens, *(str(perplexity(own[step])) for step in steps)])
    columns = ["source", "model", f"tokens scored at {steps[0]:,}", *(f"{step:,}" for step in steps)]
    models = _perplexities({source: curves[f"model/{source}"] for source in sources})
    gains = {
        source: {step: value / curve[steps[0]] for step, value in curve.items()} for source, curve in models.items()
    }
    plot_curves(gains, TOKENS, f"{PERPLEXITY}, of that at {steps[0]:,} tokens", output / "perplexity-sources.png")
    return _points(curves), [Table("Perplexity by source", columns, rows)], ["perplexity-sources.png"]


def _beside_others(scored: list[Scored], output: Path) -> Part:
    windows, curve = at_steps(scored, DISTRACTED), curve_of(scored, DISTRACTED)
    own, alone = max(at_steps(scored, "model")), curve[0].perplexity
    rows: list[list[Value]] = []
    for step, sums in curve.items():
        more = difference(windows[step], windows[0])
        rows.append([step, sums.perplexity, sums.perplexity / alone, str(more), sums.bits_per_byte])
    columns = ["tokens of other documents", "perplexity", "of that without", "more than without, nats", "bits a byte"]
    note = f"Read before {own:,} tokens of the own document, whose last window is scored. Intervals of 95 %."
    across = f"tokens of other documents in memory, before {own:,} of the own"
    plot_curves(_perplexities({"model": curve}), across, PERPLEXITY, output / "perplexity-distracted.png")
    table = Table("Perplexity beside other documents", columns, rows, note)
    return _points({DISTRACTED: curve}), [table], ["perplexity-distracted.png"]


def _points(curves: Mapping[str, Mapping[int, Sums]]) -> list[Point]:
    return [
        Point(f"perplexity/{name}", step, sums.perplexity)
        for name, curve in curves.items()
        for step, sums in curve.items()
    ]


def _perplexities(curves: Mapping[str, Mapping[int, Sums]]) -> dict[str, dict[int, float]]:
    return {name: {step: sums.perplexity for step, sums in curve.items()} for name, curve in curves.items()}


def _what(dataset: TokenDataset, subject: Subject, settings: Perplexity) -> str:
    """What was scored, in a sentence."""
    first, *_ = batches = _batches(dataset, subject, settings)
    same = [window for batch in batches if batch.context == first.context for window in batch.windows]
    documents = len({window.document for window in same})
    if settings.mode == "whole_document":
        return (
            f"The first tokens of {documents} held-out documents, as many as the length says, each with all before it."
        )
    return (
        f"The same {len(same)} windows of {subject.local:,} tokens at every length, of {documents} held-out documents."
    )


def _batches(dataset: TokenDataset, subject: Subject, settings: Perplexity) -> list[ScoredRows]:
    """What is scored, in cells of about `TOKENS_A_CELL` or one window. Which windows, depends on the longest context
    that is asked for; how far they are read, on the reader too."""
    local, longest = subject.local, max(settings.contexts)
    read = [context for context in dict.fromkeys(settings.contexts) if subject.reading.reaches(context * local)]
    if settings.mode == "whole_document":
        documents = choose_documents(dataset, local, longest, CONTEXTS)[: -(-settings.windows // longest)]
        far = max(read)
        ends = [Window(document, (far - 1) * local) for document in documents]
        return [ScoredRows(far, some, far) for some in _split(ends, TOKENS_A_CELL // (far * local))]
    windows = choose_windows(dataset, local, longest, settings.windows, CONTEXTS)
    return [
        ScoredRows(context, some, 1) for context in read for some in _split(windows, TOKENS_A_CELL // (context * local))
    ]


def _distracted(dataset: TokenDataset, local: int, settings: Perplexity) -> list[tuple[int, list[Window]]]:
    """(local contexts of others, windows of one document) of each cell; without others, too, for comparison."""
    if not settings.others:
        return []
    longest = max(settings.contexts)
    windows = choose_windows(dataset, local, longest, settings.windows, CONTEXTS)
    return [
        (amount, some)
        for amount in (0, *dict.fromkeys(settings.others))
        for _, own in groupby(windows, lambda window: window.document)
        for some in _split(list(own), max(TOKENS_A_CELL, amount * local) // (longest * local))
    ]


def _split(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Lists of up to `size`, at least one."""
    size = max(1, size)
    return [list(items[first : first + size]) for first in range(0, len(items), size)]


def _at_once(subject: Subject, name: str, tokens: int) -> int:
    """Rows of `tokens` read together."""
    return rows_together(subject, name, tokens, max(1, TOKENS_AT_ONCE // subject.local))


def _key(name: str, batch: ScoredRows) -> str:
    return f"{name}-{batch.context}-{batch.windows[0].document}-{batch.windows[0].start}"


def _distracted_key(amount: int, windows: list[Window]) -> str:
    return f"others-{amount}-{windows[0].document}-{windows[0].start}"


def _bytes(subject: Subject, name: str, rows: int, tokens: int) -> int:
    """Weights, what reading holds, and logits of scored windows: of all rows as the model gives them, of one in float32
    twice."""
    logits = read_config(subject.models[name])["vocab_size"] * subject.local * (4 * rows + 8)
    held = held_bytes(subject, name, tokens, rows)
    return weights_bytes(subject.models[name], subject.dtype) + held + logits
