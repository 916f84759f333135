"""Asking many things about one text that was read once.

The memory is held once and shared by all rows of a batch, however many are asked at once: to a memory, where nothing is
masked, the rows are but more queries. What lies in the local context is held by each row.

Shapes: B rows, L tokens, V vocabulary, H query heads, D head size.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fot_model import FotCache, FotLlamaForCausalLM
from fot_model.attention import Partial
from fot_model.memory import Memory

READ_ONLY = "a shared memory is only read: the local context must hold all that is asked"


class SharedMemory:
    """A memory of one row (`held`) that every row of a batch attends to. It is only read."""

    def __init__(self, held: Memory) -> None:
        self._held = held

    def __len__(self) -> int:
        return len(self._held)

    def append(self, layer: int, k_BHkLD: Tensor, v_BHkLD: Tensor, seen_BL: Tensor | None = None) -> None:
        raise AssertionError(READ_ONLY)

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        B, _, L, _ = q_BHLD.shape
        part = self._held.attend(layer, q_BHLD.transpose(0, 1).flatten(1, 2)[None], scale)
        if part is None:
            return None
        out, lse = (x[0].unflatten(1, (B, L)).transpose(0, 1) for x in part)
        return out, lse

    def truncate(self, length: int) -> None:
        assert length == len(self), READ_ONLY

    def reset(self) -> None:
        raise AssertionError(READ_ONLY)

    def select(self, rows: Tensor) -> None:
        """All rows see the same."""

    def hide(self, seen_BM: Tensor) -> None:
        raise AssertionError(READ_ONLY)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing of its own: it goes with any number of rows."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise AssertionError(READ_ONLY)


class SharedPrompt:
    """What stands before each question: a memory of one row and `ids`, the tokens since, in the local context of `rows`
    rows. Everything asked must fit into the rest of the local context (`local` tokens)."""

    def __init__(self, model: FotLlamaForCausalLM, memory: Memory, ids: Sequence[int], rows: int, local: int) -> None:
        self._model, self._rows, self._local = model, rows, local
        self._cache = FotCache(model.config, SharedMemory(memory))
        if len(ids):
            self._read(torch.as_tensor(ids)[None], None)
        self._cache.batch_repeat_interleave(rows)
        self._start = self._cache.get_seq_length()

    def answer(
        self, questions: Sequence[Sequence[int]], room: int, ended: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Each question's greedy continuation of up to `room` tokens; those after `ended` mean nothing."""
        answers = []
        for chunk in _chunks(questions, self._rows):
            self._cache.truncate(self._start)
            made: list[list[int]] = [[] for _ in range(self._rows)]
            logits_BLV = self._read(*pad_left(chunk))
            while True:
                next_B = logits_BLV[:, -1].argmax(-1)
                for row, token in zip(made, next_B.tolist(), strict=True):
                    row.append(token)
                if len(made[0]) == room or all(map(ended, made)):
                    break
                logits_BLV = self._read(next_B[:, None], None)
            answers += made
        return answers[: len(questions)]

    def log_probabilities(self, question: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """Of each candidate, whole, after the question."""
        self._cache.truncate(self._start)
        asked_BL = torch.as_tensor(question).expand(self._rows, -1)
        first_BV = self._read(asked_BL, None)[:, -1:].float().log_softmax(-1)
        before = self._cache.get_seq_length()
        found: list[float] = []
        for chunk in _chunks(candidates, self._rows):
            self._cache.truncate(before)
            longest = max(map(len, chunk))
            answer_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in chunk], device=first_BV.device)
            real_BL = torch.arange(longest) < torch.tensor([[len(row)] for row in chunk])
            rest = self._read(answer_BL[:, :-1], None, longest - 1).float().log_softmax(-1) if longest > 1 else None
            after = first_BV if rest is None else torch.cat([first_BV, rest], dim=1)
            chosen_BL = after.gather(2, answer_BL[..., None])[..., 0]
            found += (chosen_BL * real_BL.to(chosen_BL.device)).sum(1).tolist()
        return found[: len(candidates)]

    def _read(self, ids_BL: Tensor, seen_BL: Tensor | None, keep: int = 1) -> Tensor:
        """Read on; logits of the last `keep` tokens."""
        output = self._model(
            ids_BL.to(self._model.device),
            attention_mask=None if seen_BL is None else seen_BL.to(self._model.device),
            past_key_values=self._cache,
            last_context_length=self._local,
            logits_to_keep=keep,
        )
        self._cache.settle()
        return output.logits


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] and which of them are no padding."""
    longest = max(map(len, rows))
    ids_BL = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
    return ids_BL, torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in rows])


def _chunks(rows: Sequence[Sequence[int]], size: int) -> list[list[Sequence[int]]]:
    """All of one size: the last is filled up with its last row."""
    chunks = [list(rows[first : first + size]) for first in range(0, len(rows), size)]
    return [chunk + chunk[-1:] * (size - len(chunk)) for chunk in chunks]
