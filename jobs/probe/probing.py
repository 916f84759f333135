"""A probe of a model: prompts are made here and read in tasks; what they showed becomes an order of layers, a table, a
picture, and the choice of memory layers."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from fot_model import default_mem_layers
from jobs.common.plot import plot_heads
from jobs.config.probe import Probe
from jobs.evaluate.cells import Cell, run_cells
from jobs.evaluate.subject import read_config, weights_bytes
from jobs.measures.result import Point, Result, Table, Value
from jobs.probe.measure import change_layers, read_prompt
from jobs.probe.prompts import FACTS, TEXT, Prompt, facts_prompt, text_prompt
from jobs.probe.ranking import Layer, choose, far_worth, heads, rank
from pipelines.config import Data, Source, source_of
from pipelines.sources.corpus import Document, Entry, Unit
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.readers import read_unit
from pipelines.sources.units import group_units
from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically

TASK = "probe"
CHOSEN, RANKING, PICTURE = "mem_layers.json", "probe.json", "probe.png"
SHOWN = 12  # rows of the table, at least
TASK_BYTES = 1 << 20  # read at once
CAUSAL = {"without": "without it", "alone": "alone"}  # columns


def text_entries(settings: Probe, hashes: FileHashes) -> list[Entry]:
    """What natural prompts are cut from. Raises UserError where it is not there."""
    return list_entries(_data(settings), 0, hashes)


def probe(
    model: Path, tokenizer: TextTokenizer, settings: Probe, count: int | None, entries: Sequence[Entry], output: Path
) -> None:
    """Measure, and write the ranking, the picture, a Result, and the `count` layers that are best for memory layers (by
    default as many as the paper would take) into `output`.

    Raises UserError for a model whose context holds no prompt or that has fewer layers, and for a tokenizer that is not
    the model's or cannot spell numbers.
    """
    config = read_config(model)
    layers, context = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
    local, tokens = settings.window(context), settings.length(context)
    if count is not None and count > layers:
        raise UserError(f"{count} memory layers are to be chosen: the model in {model} has {layers} layers")
    if tokens > context:
        raise UserError(f"--tokens {tokens}: the model in {model} was made for {context}: lower it")
    if tokenizer.vocab_size > config["vocab_size"]:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model in {model} only {config['vocab_size']}: it is "
            f"another model's"
        )
    prompts = make_prompts(tokenizer, settings, local, tokens, entries)
    results = run_cells(TASK, list(_cells(model, config, prompts, settings.causal, local)), output)
    measured = {kind: [results[f"{kind}-{number}"] for number in range(settings.prompts)] for kind in prompts}
    changed = {kind: [results[f"{kind}-{number}-causal"] for number in range(settings.causal)] for kind in prompts}
    ranked = rank(measured)
    chosen = choose(ranked, count or len(default_mem_layers(layers)))
    found: dict[str, Any] = {
        "settings": {**settings.model_dump(mode="json"), "local": local, "tokens": tokens},
        "queries": {kind: sum(len(prompt.queries) for prompt in own) for kind, own in prompts.items()},
        "loss": {kind: fmean(each["loss"] for each in own) for kind, own in measured.items()},
        "mem_layers": chosen,
        "layers": [asdict(layer) for layer in ranked],
        "heads": {what: heads(measured, what) for what in ("copy", "line")},
        "causal": far_worth(changed) if settings.causal else {},
    }
    maps = {"on the token": found["heads"]["copy"], "on its line": found["heads"]["line"]}
    plot_heads(maps, chosen, output / PICTURE)
    write_atomically(output / RANKING, json.dumps(found, indent=1).encode())
    _result(ranked, found).write(output)
    write_atomically(output / CHOSEN, json.dumps({"mem_layers": chosen}).encode())


def make_prompts(
    tokenizer: TextTokenizer, settings: Probe, local: int, tokens: int, entries: Sequence[Entry]
) -> dict[str, list[Prompt]]:
    """Prompts by kind, the same for the same settings and text. Raises UserError where none can be made."""
    documents = _documents(settings, entries)
    numbers = range(settings.prompts)
    return {
        FACTS: [facts_prompt(tokenizer, tokens, local, f"{settings.seed}/{FACTS}/{number}") for number in numbers],
        TEXT: [
            text_prompt(tokenizer, documents, tokens, local, f"{settings.seed}/{TEXT}/{number}") for number in numbers
        ],
    }


def read_chosen(output: Path) -> list[int]:
    """The memory layers that a finished probe chose."""
    return list(json.loads((output / CHOSEN).read_text())["mem_layers"])


def _data(settings: Probe) -> Data:
    return Data.model_validate({"sources": [{"name": "text", **source_of(settings.text)}]})


def _documents(settings: Probe, entries: Sequence[Entry]) -> Iterator[str]:
    """The texts, in random order."""
    source, draw = _data(settings).sources[0], random.Random(f"{settings.seed}/documents")
    units = group_units(draw.sample(entries, len(entries)), TASK_BYTES)
    return chain.from_iterable(_texts(unit, source) for unit in draw.sample(units, len(units)))


def _texts(unit: Unit, source: Source) -> Iterator[str]:
    for document in read_unit(unit, source):
        if isinstance(document, Document):
            yield document.text


def _cells(
    model: Path, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Prompt]], causal: int, local: int
) -> Iterator[Cell]:
    weights, layers = weights_bytes(model), int(config["num_hidden_layers"])
    for kind, own in prompts.items():
        for number, prompt in enumerate(own):
            held, tokens = weights + _working_bytes(config, prompt), len(prompt.ids)
            what = f"a prompt of {tokens} tokens"
            yield Cell(f"{kind}-{number}", read_prompt, (model, prompt), tokens, held, what, weights=weights)
            if number < causal:
                mask = 8 * tokens * tokens
                key, read = f"{kind}-{number}-causal", (layers + 2) * tokens
                yield Cell(key, change_layers, (model, prompt, local), read, held + mask, what, weights=weights)


def _working_bytes(config: Mapping[str, Any], prompt: Prompt) -> int:
    """Of one layer: its hidden states, and the scores of the queries with all keys."""
    heads, tokens = int(config["num_attention_heads"]), len(prompt.ids)
    wide = 8 * int(config["hidden_size"]) + 4 * int(config.get("intermediate_size") or 0)
    return 4 * tokens * wide + 16 * heads * len(prompt.queries) * tokens


def _result(ranked: Sequence[Layer], found: Mapping[str, Any]) -> Result:
    settings, chosen, worth = found["settings"], found["mem_layers"], found["causal"]
    shown = max(place for place, layer in enumerate(ranked) if layer.number in chosen or place < SHOWN) + 1
    rows: list[list[Value]] = []
    for layer in ranked[:shown]:
        low, high = layer.score - layer.spread, layer.score + layer.spread
        row: list[Value] = [f"{layer.number}{' *' if layer.number in chosen else ''}", layer.head, layer.score]
        row += [f"{low:.3f} to {high:.3f}", *layer.by_kind.values(), layer.line]
        rows.append([*row, *(worth[name][layer.number] for name in CAUSAL if worth)])
    asked = " and ".join(
        f"{queries} tokens of {kind} (loss {found['loss'][kind]:.2f})" for kind, queries in found["queries"].items()
    )
    note = (
        f"Share of the attention of a layer's best head on the very token to copy, by kind of prompt too, and on its "
        f"line. {settings['prompts']} prompts of each kind, of up to {settings['tokens']:,} tokens in full attention, "
        f"ask for {asked}, all at least {settings['local']:,} tokens back. Intervals of 95 %. "
        f"* = as memory layers: {', '.join(map(str, chosen))}."
    )
    if worth:
        note += (
            f" By how many nats the answers' loss rises without a layer's far attention (with all of it: "
            f"{worth['all'][0]:.2f}), and falls by it alone where no other layer has any (without any: "
            f"{worth['none'][0]:.2f})."
        )
    columns = ["layer", "best head", "on the token", "interval", *ranked[0].by_kind, "on its line"]
    columns += [title for title in CAUSAL.values() if worth]
    by_number = sorted(ranked, key=lambda layer: layer.number)
    points = [Point("probe/copy", layer.number, layer.score) for layer in by_number]
    points += [Point("probe/line", layer.number, layer.line) for layer in by_number]
    return Result(TASK, settings, points, [Table("Layers that retrieve", columns, rows, note)], [PICTURE])
