"""Packing: document groups of k consecutive contexts of L tokens, as a pure function of the documents' lengths.

A long document fills groups on its own. What is left of it, and short documents, are joined longest first and cut into
groups, so that each holds few documents. Every token of every document is used once, but for the remainder of the
last, incomplete group, which is counted.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """Document groups as runs of pieces: group g holds pieces offsets[g] to offsets[g + 1].

    A piece is tokens [start, start + length) of a document. `dropped`: tokens of the incomplete last group.
    """

    offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, group: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of a group, in order."""
        run = slice(self.offsets[group], self.offsets[group + 1])
        return list(zip(*(column[run].tolist() for column in (self.document, self.start, self.length)), strict=True))


def pack(documents: np.ndarray, lengths: np.ndarray, group_tokens: int) -> Groups:
    """Groups of `group_tokens` (k * L) tokens from documents (their numbers) of the given lengths."""
    full = lengths // group_tokens
    own_document = np.repeat(documents, full)
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    own_start = within * group_tokens

    tail = lengths - full * group_tokens
    order = np.argsort(-tail, kind="stable")
    order = order[tail[order] > 0]
    end = np.cumsum(tail[order])
    begin = end - tail[order]
    shared = int(end[-1]) // group_tokens if len(end) else 0

    # Cut the joined tails at the group boundaries: pieces begin where a tail begins and where a group does.
    cuts = np.union1d(begin, np.arange(shared + 1) * group_tokens)
    cuts = cuts[cuts <= shared * group_tokens]
    piece_begin, piece_length = cuts[:-1], np.diff(cuts)
    owner = np.searchsorted(end, piece_begin, side="right")
    tail_document = documents[order][owner]
    tail_start = (full[order] * group_tokens)[owner] + piece_begin - begin[owner]
    first_piece = np.searchsorted(piece_begin, np.arange(shared + 1) * group_tokens)

    return Groups(
        offsets=np.concatenate([np.arange(len(own_document)), len(own_document) + first_piece]),
        document=np.concatenate([own_document, tail_document]),
        start=np.concatenate([own_start, tail_start]),
        length=np.concatenate([np.full(len(own_document), group_tokens), piece_length]),
        dropped=int(lengths.sum()) - (len(own_document) + shared) * group_tokens,
    )
