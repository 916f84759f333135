"""How a model reads a long text. What is asked is the same for all: the loss of a text's last windows, and what
follows a prompt.

- `memory`: window by window, what was read is in the memory layers' memory (FoT, Memorizing Transformer; a model
  without memory layers sees the window alone). One that was trained as a Transformer-XL sees the windows before in
  every layer, as in training.
- `full`: every layer attends to all of the text, as any LLaMA does (`full_attention.py`).
- `yarn`, `dynamic_ntk`: the same with other frequencies of RoPE, without training.
- `bm25`: passages of the text, found by what stands in the local context, are put into it (`retrieval.py`).

Shapes: B rows, T tokens of a text, c windows of L tokens, A tokens of an answer, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.evaluation import MemorySettings
from jobs.evaluate.full_attention import PIECE, Ask, FullReader, ntk_rope, yarn_rope
from jobs.evaluate.retrieval import RetrievalReader
from jobs.evaluate.subject import (
    Subject,
    is_chained,
    load_model,
    memory_bytes,
    new_cache,
    number_bytes,
    read_config,
    read_into,
    read_tokenizer,
)
from jobs.measures.scoring import score, score_chain
from pipelines.workflow.errors import UserError

FULL_TOKENS_AT_ONCE = 2**13  # of texts that are read together in full attention, each with its cache


class Reader(Protocol):
    def losses(self, text_BT: Tensor, scored: int) -> Tensor:
        """Loss (nats) of each of the last `scored` windows of texts of T = c x L + 1 tokens: float64 [B, scored]."""

    def ask(self, prompt_BT: Tensor, question: int, room: int) -> Ask:
        """Read prompts, the last `question` tokens of which ask something, and be ready for any number of answers of up
        to `room` tokens. The prompt and the room together are whole windows."""


class MemoryReader:
    def __init__(self, model: FotLlamaForCausalLM, memory: MemorySettings, local: int) -> None:
        self._model, self._memory, self._local = model, memory, local

    def losses(self, text_BT: Tensor, scored: int) -> Tensor:
        return score(self._model, text_BT, self._local, self._model.device, self._new_cache(), scored)

    def ask(self, prompt_BT: Tensor, question: int, room: int) -> Ask:
        cache, in_memory = self._new_cache(), prompt_BT.shape[1] + room - self._local
        read_into(self._model, cache, prompt_BT[:, :in_memory], self._local)
        first_B1V = self._go_on(prompt_BT[:, in_memory:], cache, 1)
        read = cache.get_seq_length()

        def after(answer_BA: Tensor) -> Tensor:
            logits_BAV = self._go_on(answer_BA, cache, answer_BA.shape[1])
            cache.truncate(read)
            return torch.cat([first_B1V, logits_BAV], dim=1)

        return after

    def _new_cache(self) -> FotCache:
        return new_cache(self._model, self._memory)

    def _go_on(self, ids_BL: Tensor, cache: FotCache, keep: int) -> Tensor:
        """Logits of the last `keep` tokens; all stays in the local context."""
        output = self._model(
            ids_BL.to(self._model.device),
            past_key_values=cache,
            last_context_length=self._local,
            logits_to_keep=keep,
        )
        cache.settle()
        return output.logits


class ChainReader(MemoryReader):
    """A Transformer-XL: what is scored sees the windows before; a question sees its own window alone."""

    def losses(self, text_BT: Tensor, scored: int) -> Tensor:
        assert scored == 1, "a chain ends in the window that is scored"
        return score_chain(self._model, text_BT, self._local, self._model.device)


def open_reader(subject: Subject, name: str) -> Reader:
    """In a task: the reader of one of the subject's models. The base reads as a model with memory does."""
    path, local = subject.models[name], subject.local
    kind = subject.reading.kind if name == "model" else "memory"
    if kind == "memory":
        reader = ChainReader if is_chained(path) else MemoryReader
        return reader(load_model(path, subject.model, subject.dtype), subject.memory, local)
    model = load_model(path, path, subject.dtype)
    match kind:
        case "full":
            return FullReader(model, local)
        case "yarn":
            rope = yarn_rope(model, subject.reading.longest)
            return FullReader(model, local, lambda _: rope)
        case "dynamic_ntk":
            return FullReader(model, local, lambda tokens: ntk_rope(model, tokens, subject.reading.longest))
        case "bm25":
            return RetrievalReader(model, read_tokenizer(path), local)
    raise AssertionError(kind)


def check_reading(subject: Subject) -> None:
    """Raises UserError where a model cannot be read as asked for."""
    kind, model = subject.reading.kind, subject.model
    if kind in ("yarn", "dynamic_ntk"):
        own = FotLlamaConfig.from_pretrained(model).rope_parameters["rope_type"]
        if own != "default":
            raise UserError(
                f"{model}: its RoPE is scaled already ({own}), which {kind} would replace: leave the rival {kind} out"
            )
    if kind != "memory" and is_chained(model):
        raise UserError(f"{model} is a Transformer-XL: it is read as it was trained (evaluation.reader: memory)")


def held_bytes(subject: Subject, name: str, tokens: int, rows: int) -> int:
    """Bytes that `rows` x `tokens` read hold at most, beside weights and logits."""
    path = subject.models[name]
    kind = subject.reading.kind if name == "model" else "memory"
    if kind == "memory":
        return memory_bytes(subject.model, subject.memory, tokens, subject.local, rows, subject.dtype)
    held = min(tokens, subject.local) if kind == "bm25" else tokens
    config = read_config(path)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    each = number_bytes(path, subject.dtype)
    buffer = rows * held * (config.get("num_key_value_heads") or heads) * size * each  # keys of a layer
    on_gpu = rows * held * (2 * heads * size * each + 5 * min(PIECE, held))  # repeated for every query head; a mask
    return 2 * layers * buffer + 2 * buffer + on_gpu


def rows_together(subject: Subject, name: str, tokens: int, at_most: int) -> int:
    """How many of `at_most` texts of `tokens` are read together: in full attention, one where they are long."""
    if name != "model" or subject.reading.kind == "memory":
        return at_most
    return max(1, min(at_most, FULL_TOKENS_AT_ONCE // tokens))
