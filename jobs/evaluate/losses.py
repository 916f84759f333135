"""The losses of scored windows: kept in a file, summed by context length and source, with intervals and differences.

Intervals are of 95 %, by a bootstrap over documents (Efron & Tibshirani, 1993): windows of one document are alike, so
whole documents are drawn with replacement, within each source as many as it has. Two models are compared window by
window, on the windows that both have scored: what is the same for both, how hard a document is, falls out of the
difference. The draws are seeded: the same losses give the same intervals.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.workflow.files import write_atomically

LOSSES = "losses.json"
DRAWS = 2000


@dataclass(frozen=True)
class Sums:
    """Over scored windows: loss (nats), tokens, bytes of their text."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, parts: Iterable["Sums"]) -> "Sums":
        all_parts = list(parts)
        nats = math.fsum(part.nats for part in all_parts)
        return cls(nats, sum(part.tokens for part in all_parts), sum(part.bytes for part in all_parts))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


class Scored(NamedTuple):
    """One window at one length: `name` of what read it; `document` and `start` of the window; `step` in tokens."""

    name: str
    source: str
    document: int
    start: int
    step: int
    sums: Sums


class Interval(NamedTuple):
    """A value, and between what the true one lies: None where fewer than two documents tell."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> str | None:
        """As in a table's column of its own."""
        return None if self.low is None or self.high is None else f"{brief(self.low)} to {brief(self.high)}"

    def __str__(self) -> str:
        return brief(self.value) if self.ends is None else f"{brief(self.value)} ({self.ends})"


def write_losses(scored: Iterable[Scored], directory: Path) -> None:
    rows = [[*one[:-1], *astuple(one.sums)] for one in scored]
    write_atomically(directory / LOSSES, json.dumps(rows).encode())


def read_losses(directory: Path) -> list[Scored]:
    rows = json.loads((directory / LOSSES).read_text())
    return [
        Scored(name, source, document, start, step, Sums(nats, tokens, size))
        for name, source, document, start, step, nats, tokens, size in rows
    ]


def renamed(scored: Iterable[Scored], names: Mapping[str, str]) -> list[Scored]:
    """The windows of the readers in `names`, called as it says."""
    return [one._replace(name=names[one.name]) for one in scored if one.name in names]


def at_steps(scored: Iterable[Scored], name: str, source: str | None = None) -> dict[int, list[Scored]]:
    """The windows of one reader by step, of one source or of all."""
    found: dict[int, list[Scored]] = {}
    for one in scored:
        if one.name == name and source in (None, one.source):
            found.setdefault(one.step, []).append(one)
    return {step: found[step] for step in sorted(found)}


def curve_of(scored: Iterable[Scored], name: str, source: str | None = None) -> dict[int, Sums]:
    """Sums by step."""
    return {step: Sums.of(one.sums for one in own) for step, own in at_steps(scored, name, source).items()}


def perplexity(scored: Sequence[Scored]) -> Interval:
    """Perplexity a token over these windows."""
    value, ends = _mean([(one, one.sums.nats) for one in scored])
    return Interval(math.exp(value), *(math.exp(end) for end in ends))


def difference(own: Sequence[Scored], others: Sequence[Scored]) -> Interval | None:
    """Nats a token of `own` less those of `others`, over the windows that both have; None where there are none."""
    there = {(one.document, one.start): one.sums.nats for one in others}
    both = [(one, one.sums.nats - there[key]) for one in own if (key := (one.document, one.start)) in there]
    if not both:
        return None
    value, ends = _mean(both)
    return Interval(value, *ends)


def _mean(parts: Sequence[tuple[Scored, float]]) -> tuple[float, tuple[float, ...]]:
    """Nats a token in all and the ends of their interval, of windows with these nats; no ends from one document."""
    sources: dict[str, dict[int, list[float]]] = {}
    for one, nats in parts:
        sums = sources.setdefault(one.source, {}).setdefault(one.document, [0.0, 0.0])
        sums[0] += nats
        sums[1] += one.sums.tokens
    value = math.fsum(nats for _, nats in parts) / sum(one.sums.tokens for one, _ in parts)
    if max(map(len, sources.values())) < 2:
        return value, ()
    draw, drawn = np.random.default_rng(0), np.zeros((DRAWS, 2))
    for name in sorted(sources):
        own = sources[name]
        each = np.array([own[document] for document in sorted(own)])  # [documents, 2]
        drawn += draw.multinomial(len(each), np.full(len(each), 1 / len(each)), DRAWS) @ each
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return value, (float(low), float(high))


def brief(value: float) -> str:
    """As many places as tell perplexities and nats apart: 1204, 83.2, 8.31, -0.084."""
    places = sum(abs(value) < bound for bound in (1000, 100, 1))
    return f"{value:.{places}f}"
