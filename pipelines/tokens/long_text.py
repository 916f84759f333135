"""Encoding texts of any length in memory that does not grow with them, into the very tokens they have in one piece.

A text is encoded in overlapping pieces, and two neighbours are joined where they agree: in the middle of a run of equal
tokens at equal places. Where they do not agree, the left one is encoded again with twice as much text on its right; in
the end the whole text is encoded at once.

Why these are the tokens of the whole text. Within a word, for byte-pair encoding: let the left piece (true text on its
left, cut off on its right) and the right piece (the reverse) have a token in common. What lies between edges that no
merge crosses is merged independently of the rest; so the first merge of the whole text to cross an edge of this token
would have happened in the left piece as well (left edge), or in the right one (right edge). There is none: the whole
text has the left piece's tokens before, the right piece's after. Across words: equal tokens also open words alike, and
a pre-tokenizer that stops at the same place goes on alike, if it looks no further ahead than a run. Models other than
BPE have no such law within a word, so their common run must hold the beginning of one.

Pieces fit the processor's caches, so that what their edges cost is more than regained.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, models

PIECE = 1 << 16  # characters encoded at once
OVERLAP = 1 << 9  # characters that neighbours share
RUN = 16  # tokens on which neighbours must agree


class Place(NamedTuple):
    """A token that covers characters [start, end) of a text, and whether it is the first of its word."""

    start: int
    end: int
    token: int
    opens_word: bool


@dataclass
class Piece:
    """Characters [begin, end) of a text, encoded: of its tokens, `first` up to `last` belong to the whole text's."""

    begin: int
    end: int
    ids: np.ndarray
    first: int
    last: int


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids (uint32) of each text, special tokens not added."""
    short = [text for text in texts if len(text) <= PIECE]
    encodings = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    return [
        np.array(next(encodings).ids, np.uint32) if len(text) <= PIECE else encode_in_pieces(tokenizer, text)
        for text in texts
    ]


def encode_in_pieces(
    tokenizer: Tokenizer, text: str, piece: int = PIECE, overlap: int = OVERLAP, run: int = RUN
) -> np.ndarray:
    """Token ids (uint32) of a text, encoded `piece` characters at a time."""
    assert 0 < 2 * overlap <= piece, "a piece's two overlaps must not meet"
    within_words = isinstance(tokenizer.model, models.BPE)

    def encode(begin: int, end: int) -> Encoding:
        return tokenizer.encode(text[begin:end], add_special_tokens=False)

    pieces: list[Piece] = []
    begin, end = 0, min(piece, len(text))
    before: Encoding | None = None  # of the last of the pieces
    while True:
        encoding = encode(begin, end)
        first = 0
        if before is not None:
            left = pieces[-1]
            joint = _joint(_tail(before, left.begin, begin), _head(encoding, begin, left.end), run, within_words)
            if joint is None:
                pieces.pop()
                before = encode(pieces[-1].begin, pieces[-1].end) if pieces else None
                begin, end = left.begin, min(2 * end - left.begin, len(text))
                continue
            left.last, first = joint
        pieces.append(Piece(begin, end, np.array(encoding.ids, np.uint32), first, len(encoding)))
        if end == len(text):
            return np.concatenate([each.ids[each.first : each.last] for each in pieces])
        before = encoding
        begin, end = end - overlap, min(end - overlap + piece, len(text))


def _joint(left: dict[Place, int], right: dict[Place, int], run: int, within_words: bool) -> tuple[int, int] | None:
    """The place in the middle of the longest run that both have: its token number in each. None if there is no run."""
    longest: list[Place] = []
    current: list[Place] = []
    expected = (-1, -1)
    for place, number in left.items():
        if place not in right:
            continue
        both = (number, right[place])
        if both == expected:
            current.append(place)
        else:
            current = [place]
        expected = (both[0] + 1, both[1] + 1)
        longest = max(longest, current, key=len)
    if len(longest) < run or not (within_words or any(place.opens_word for place in longest)):
        return None
    middle = longest[len(longest) // 2]
    return left[middle], right[middle]


def _head(encoding: Encoding, begin: int, end: int) -> dict[Place, int]:
    """The places before character `end` of the text; the encoding begins at `begin`."""
    count = len(encoding)
    last = next((number for number in range(count) if begin + _span(encoding, number)[0] >= end), count)
    return _places(encoding, begin, range(last))


def _tail(encoding: Encoding, begin: int, start: int) -> dict[Place, int]:
    """The places after character `start` of the text; the encoding begins at `begin`."""
    count = len(encoding)
    before = (number for number in reversed(range(count)) if begin + _span(encoding, number)[0] < start)
    return _places(encoding, begin, range(next(before, -1) + 1, count))


def _places(encoding: Encoding, begin: int, numbers: range) -> dict[Place, int]:
    """The places of consecutive tokens, with their numbers; of equal ones, bytes of one character, the last."""
    ids, places = encoding.ids, {}
    for number in numbers:
        start, end = _span(encoding, number)
        opens_word = number > 0 and encoding.token_to_word(number) != encoding.token_to_word(number - 1)
        places[Place(begin + start, begin + end, ids[number], opens_word)] = number
    return places


def _span(encoding: Encoding, number: int) -> tuple[int, int]:
    span = encoding.token_to_chars(number)
    assert span is not None, "a token of the encoding"
    return span
