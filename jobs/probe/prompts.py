"""Prompts that only far tokens answer, with the answers in them: where each is to be copied from is known.

- `facts`: made-up lines about people, each with a number, in plain filler; at the end every one is asked for again.
  They differ in names and numbers alone, so the name must be matched.
- `text`: natural text in which a word of several tokens occurs exactly twice: after its first token the others can be
  copied from its first occurrence.

Every query is the position before a token of an answer; what it should see is the same token of the first occurrence
(`copy`), and the line that one stands in (`line`). All lines end at least a window before the first query.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.errors import UserError

FACTS = "facts"
TEXT = "text"
MOST_FACTS, FEWEST_FACTS = 4, 2  # of a prompt: two at least, so that there is something to tell apart
DIGITS = 5
STEMS = (
    "the ticket that {name} bought carries the number",
    "the boat that {name} built sails under the number",
    "the shelf where {name} keeps the tools has the number",
    "the letter that {name} wrote was filed under the number",
)
FIRST_NAMES = (
    "Agnes",
    "Bruno",
    "Clara",
    "Dmitri",
    "Esther",
    "Felix",
    "Greta",
    "Hugo",
    "Ingrid",
    "Jasper",
    "Katya",
    "Leon",
)
LAST_NAMES = (
    "Abbott",
    "Berger",
    "Castillo",
    "Dunn",
    "Eriksen",
    "Fischer",
    "Grant",
    "Holm",
    "Ivanov",
    "Jensen",
    "Keller",
    "Lopez",
)
FILLER = (
    ("In the morning", "After lunch", "Late in the day", "On quiet evenings", "Before the rain", "Once a week"),
    ("the baker", "a neighbour", "the old teacher", "one of the sailors", "the gardener", "a young painter"),
    ("walks along", "looks across", "talks about", "returns from", "sits beside", "thinks of"),
    ("the river", "the market", "the garden wall", "the empty square", "the small library", "the railway bridge"),
    ("and says little.", "as everybody does.", "without any hurry.", "and then goes home.", "in good company."),
)
CHARACTERS = 16  # of a natural prompt, for each of its tokens: none has more on average
LINE = 32  # tokens of a natural line on each side of its word, at most
SHORTEST_WORD, FEWEST_TOKENS = 6, 3  # characters, tokens: of a word that is rare enough to be copied
FEWEST_WORDS, MOST_WORDS = 2, 8  # of a natural prompt
TRIES, PIECES = 100, 4  # documents looked at for each natural prompt, and pieces of each


class Query(NamedTuple):
    """Positions of tokens: where the answer's next token is predicted, where it is to be copied from, and the first and
    last (exclusive) of the line that holds it."""

    at: int
    copy: int
    line: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """`ids` begins with bos and holds the answers; no two queries are at the same place."""

    kind: str
    ids: list[int]
    queries: list[Query]


@dataclass(frozen=True)
class _Tokens:
    """A text's tokens behind bos: ids, and where each begins and ends in the text."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: TextTokenizer, text: str) -> "_Tokens":
        made = tokenizer.tokenizer.encode(text, add_special_tokens=False)
        starts, ends = [0, *(start for start, _ in made.offsets)], [0, *(end for _, end in made.offsets)]
        return cls([tokenizer.bos, *made.ids], starts, ends)

    def span(self, start: int, end: int) -> range:
        """The tokens that hold the characters from `start` to `end`."""
        first = bisect_right(self.ends, start)
        last = first
        while last < len(self.ids) and self.starts[last] < end:
            last += 1
        return range(first, last)


def facts_prompt(tokenizer: TextTokenizer, tokens: int, local: int, seed: str) -> Prompt:
    """A prompt of at most so many tokens, with as many facts as fit, up to four.

    Raises UserError where two do not, and for a tokenizer that cannot spell the numbers.
    """
    for count in range(MOST_FACTS, FEWEST_FACTS - 1, -1):
        draw = random.Random(seed)
        facts = _draw_facts(count, draw)
        lines, questions = [f"Note that {fact}." for fact in facts], _questions(facts, draw)
        fixed = 1 + len(_Tokens.of(tokenizer, "\n".join([*lines, *questions, ""])).ids)
        filler = list(_filler(tokenizer, tokens - fixed, draw))
        near = _near(filler, local)
        if fixed + local <= tokens and near is not None:
            return _lay_out(tokenizer, lines, questions, [line for line, _ in filler], near, local, draw)
    raise UserError(
        f"prompts of {tokens} tokens are too short: {FEWEST_FACTS} facts, their questions and {local} tokens between "
        f"take about {fixed + local + LINE}; raise --tokens as far as the model's context allows, or lower --local"
    )


def _draw_facts(count: int, draw: random.Random) -> list[str]:
    stem = draw.choice(STEMS)
    people = zip(draw.sample(FIRST_NAMES, count), draw.sample(LAST_NAMES, count), strict=True)
    numbers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)
    return [
        f"{stem.format(name=f'{first} {last}')} {number}" for (first, last), number in zip(people, numbers, strict=True)
    ]


def _questions(facts: Sequence[str], draw: random.Random) -> list[str]:
    return [f"As was noted, {fact}." for fact in draw.sample(facts, len(facts))]


def _filler(tokenizer: TextTokenizer, room: int, draw: random.Random) -> Iterator[tuple[str, int]]:
    """Lines with their tokens, as many as there is room for."""
    while True:
        line = " ".join(draw.choice(part) for part in FILLER)
        size = len(tokenizer.encode(f"\n{line}"))
        if (room := room - size) < 0:
            return
        yield line, size


def _near(filler: Sequence[tuple[str, int]], local: int) -> int | None:
    """How many of the last lines lie between facts and questions, to make a window; None where all are too few."""
    taken = 0
    for count, (_, size) in enumerate(reversed(filler), 1):
        taken += size
        if taken >= local:
            return count
    return None


def _lay_out(
    tokenizer: TextTokenizer,
    facts: list[str],
    questions: list[str],
    filler: list[str],
    near: int,
    local: int,
    draw: random.Random,
) -> Prompt:
    far = filler[: len(filler) - near]
    for fact in facts:
        far.insert(draw.randint(0, len(far)), fact)
    text = "\n".join([*far, *filler[len(filler) - near :], *questions])
    made, queries = _Tokens.of(tokenizer, text), []
    for fact in facts:
        number = fact.removesuffix(".")[-DIGITS:]
        places = [match.start() for match in re.finditer(number, text)]
        assert len(places) == 2, "a fact is told once and asked for once"
        first, second = (made.span(place, place + DIGITS) for place in places)
        answer = [made.ids[at] for at in second]
        if [made.ids[at] for at in first] != answer or number not in tokenizer.tokenizer.decode(answer):
            raise UserError(f"the tokenizer cannot spell the number {number}: a probe needs one that reads digits")
        line = made.span(text.rindex("\n", 0, places[0]) + 1 if "\n" in text[: places[0]] else 0, places[0] + DIGITS)
        queries += _copies(first, second, line)
    return Prompt(FACTS, made.ids, sorted(queries))


def _copies(first: range, second: range, line: range) -> list[Query]:
    return [Query(at - 1, copy, (line.start, line.stop)) for copy, at in zip(first, second, strict=True)]


def text_prompt(tokenizer: TextTokenizer, documents: Iterator[str], tokens: int, local: int, seed: str) -> Prompt:
    """A piece of one of the next documents, with recurring words. Raises UserError where there is none."""
    draw = random.Random(seed)
    for text in chain.from_iterable(repeat(text, PIECES) for _, text in zip(range(TRIES), documents, strict=False)):
        begin = text.find("\n", draw.randint(0, max(0, len(text) - 4 * tokens))) + 1
        piece = text[begin : begin + CHARACTERS * tokens]
        made = _Tokens.of(tokenizer, piece)
        if len(made.ids) < tokens:
            continue
        made = _Tokens(made.ids[:tokens], made.starts[:tokens], made.ends[:tokens])
        if queries := _recurring(made, piece[: made.ends[-1]], local, draw):
            return Prompt(TEXT, made.ids, queries)
    raise UserError(
        f"no text of {tokens} tokens was found in which {FEWEST_WORDS} words of {FEWEST_TOKENS} tokens recur, more "
        f"than {local} tokens later: give longer texts (--data FILES), or lower --local"
    )


def _recurring(made: _Tokens, text: str, local: int, draw: random.Random) -> list[Query]:
    """Queries for words that occur exactly twice, far apart, in the same tokens; none where they are too few."""
    words = sorted({word for word in re.findall(r"\w+", text) if len(word) >= SHORTEST_WORD})
    found: list[list[Query]] = []
    for word in words:
        if text.count(word) != 2:
            continue
        place = text.index(word)
        first, second = (made.span(at, at + len(word)) for at in (place, text.rindex(word)))
        same = [made.ids[at] for at in first] == [made.ids[at] for at in second]
        begin = text.rfind("\n", 0, place) + 1
        end = text.find("\n", place)
        line = made.span(begin, len(text) if end < 0 else end)
        line = range(max(line.start, first.start - LINE), min(line.stop, first.stop + LINE))
        if same and len(second) >= FEWEST_TOKENS and second.start - line.stop >= local:
            found.append(_copies(first[1:], second[1:], line))  # the first token is what tells which word it is
    if len(found) < FEWEST_WORDS:
        return []
    chosen = draw.sample(found, min(MOST_WORDS, len(found)))
    return sorted({query.at: query for queries in chosen for query in queries}.values())
