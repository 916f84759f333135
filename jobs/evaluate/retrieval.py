"""Retrieval put into the local context (BM25): what a model without memory is shown of a long text.

The room before the tokens to be foretold is shared: half of the local context for passages of the text, the rest for
the most recent tokens. The text before the recent tokens is split into passages of `PASSAGE` tokens; those that BM25
(Lucene's variant, words in lower case, English stop words left out) ranks highest for the query stand in the text's
order before the recent tokens; of passages that rank the same the later one comes first. Where all of the text fits,
it stands there as it is.

Passages are chosen by what the model may know: the labels that are scored come after, a part of a window at a time.

Shapes: B rows, T tokens of a text, L tokens read, A tokens of an answer or labels of a part, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from fot_model import FotLlamaForCausalLM
from jobs.evaluate.full_attention import Ask, full_attention, read_on, token_losses
from jobs.measures.scoring import count_windows
from pipelines.tokens.tokenizer import TextTokenizer

PASSAGE = 64  # tokens
SHARE = 0.5  # of the local context, for passages
PARTS = 4  # a window is scored in so many, each with passages of its own


def passages(text: Sequence[int], size: int) -> list[list[int]]:
    """The text in pieces of `size` tokens, the last as long as is left."""
    return [list(text[first : first + size]) for first in range(0, len(text), size)]


def best_passages(texts: Sequence[str], query: str, count: int) -> list[int]:
    """Places of the `count` texts that BM25 ranks highest, in order."""
    import bm25s

    words, (asked,) = (bm25s.tokenize(each, return_ids=False, show_progress=False) for each in (list(texts), [query]))
    scores = np.zeros(len(texts))
    if asked and any(words):
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        scores = index.get_scores(asked)
    later_first = np.lexsort((-np.arange(len(texts)), -scores))
    return sorted(later_first[:count].tolist())


def with_passages(
    known: Sequence[int], room: int, local: int, tokenizer: TextTokenizer, query: Sequence[int] | None = None
) -> list[int]:
    """Up to `room` tokens to read in place of all that is `known`: its passages that fit the query, by default the
    recent tokens themselves, then the recent tokens."""
    if len(known) <= room:
        return list(known)
    count = min(int(SHARE * local), room - 1) // PASSAGE
    recent = known[len(known) - (room - count * PASSAGE) :]
    pieces = passages(known[: len(known) - len(recent)], PASSAGE)
    texts = [tokenizer.tokenizer.decode(piece) for piece in pieces]
    asked = tokenizer.tokenizer.decode(list(recent if query is None else query))
    best = best_passages(texts, asked, count)
    return [token for place in best for token in pieces[place]] + list(recent)


class RetrievalReader:
    """Passages in the local context. Nothing is kept from one call to the next: every part of a window is read with its
    passages, recent tokens before it, and no more than `local` tokens in all."""

    def __init__(self, model: FotLlamaForCausalLM, tokenizer: TextTokenizer, local: int) -> None:
        self._model, self._tokenizer, self._local = model, tokenizer, local

    def losses(self, text_BT: Tensor, scored: int) -> Tensor:
        first = (count_windows(text_BT, self._local) - scored) * self._local
        with full_attention(self._model):
            rows = [self._row_losses(text_T, first) for text_T in text_BT]
        return torch.stack(rows).unflatten(1, (scored, self._local)).sum(-1)

    def _row_losses(self, text_T: Tensor, first: int) -> Tensor:
        """Loss of every label after the first `first` tokens and one: part by part, each with what is known before."""
        part, losses = max(1, self._local // PARTS), []
        for start in range(first, len(text_T) - 1, part):
            known, labels_A = text_T[: start + 1].tolist(), text_T[start + 1 : start + 1 + part]
            room = self._local - len(labels_A) + 1
            shown = torch.tensor(with_passages(known, room, self._local, self._tokenizer))
            inputs_1L = torch.cat([shown, labels_A[:-1]])[None]
            hidden_1LC = read_on(self._model, inputs_1L, DynamicCache())
            losses.append(token_losses(self._model, hidden_1LC[:, -len(labels_A) :], labels_A[None])[0])
        return torch.cat(losses)

    def ask(self, prompt_BT: Tensor, question: int, room: int) -> Ask:
        def shown(prompt: list[int]) -> Tensor:
            asked = prompt[len(prompt) - question :]
            return torch.tensor(with_passages(prompt, self._local - room, self._local, self._tokenizer, asked))

        rows = [shown(prompt) for prompt in prompt_BT.tolist()]

        def after(answer_BA: Tensor) -> Tensor:
            found = []
            with full_attention(self._model):
                for shown_L, answer_A in zip(rows, answer_BA, strict=True):
                    hidden_1LC = read_on(self._model, torch.cat([shown_L, answer_A])[None], DynamicCache())
                    found.append(self._model.lm_head(hidden_1LC[:, -len(answer_A) - 1 :]))
            return torch.cat(found)

        return after
