"""A LLaMA in full attention: every layer attends to all of a text, however long it is.

It goes through the text in pieces of `PIECE` tokens with a cache of keys and values, so what it holds grows with the
text by these alone: there is never a score for each pair of tokens, nor a logit of a token that is not scored.

Two kinds of RoPE for texts longer than the model was made for, by transformers' formulas, without training: YaRN
(arXiv 2309.00071), whose frequencies are the same for every text, and dynamic NTK, whose frequencies follow from a
text's length: those that transformers takes in one call with the whole text, from its first token on.

Shapes: B rows, T tokens of a text, L tokens a window or piece, M keys, A tokens of an answer, V vocabulary, C hidden
size, H query heads, Hk key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from fot_model.attention import attend, merge
from jobs.measures.scoring import count_windows

PIECE = 512  # tokens of a text that are read at once
IN_PIECES = "fot_in_pieces"  # how transformers knows `attend_in_pieces`

Ask = Callable[[Tensor], Tensor]
"""Logits [B, A + 1, V] of the last token of what was read and of answers [B, A] after it."""


class FullReader:
    """Full attention. `rope_of`: the RoPE for a text of so many tokens, by default the model's own."""

    def __init__(
        self,
        model: FotLlamaForCausalLM,
        local: int,
        rope_of: Callable[[int], LlamaRotaryEmbedding] | None = None,
    ) -> None:
        self._model, self._local = model, local
        self._rope_of = rope_of or (lambda _: model.model.rotary_emb)

    def losses(self, text_BT: Tensor, scored: int) -> Tensor:
        cache, counted = DynamicCache(), count_windows(text_BT, self._local) - scored
        losses = []
        with full_attention(self._model, self._rope_of(text_BT.shape[1] - 1)):
            for start, end in _pieces(text_BT.shape[1] - 1, counted * self._local):
                hidden_BLC = read_on(self._model, text_BT[:, start:end], cache)
                if start >= counted * self._local:
                    losses.append(token_losses(self._model, hidden_BLC, text_BT[:, start + 1 : end + 1]))
        return torch.cat(losses, dim=1).unflatten(1, (scored, self._local)).sum(-1)

    def ask(self, prompt_BT: Tensor, question: int, room: int) -> Ask:
        cache, length = DynamicCache(), prompt_BT.shape[1]
        rope = self._rope_of(length + room)
        with full_attention(self._model, rope):
            for start, end in _pieces(length):
                hidden_BLC = read_on(self._model, prompt_BT[:, start:end], cache)
        last_B1C = hidden_BLC[:, -1:]

        def after(answer_BA: Tensor) -> Tensor:
            with full_attention(self._model, rope):
                hidden_BAC = read_on(self._model, answer_BA, cache)
            cache.crop(-answer_BA.shape[1])
            return self._model.lm_head(torch.cat([last_B1C, hidden_BAC], dim=1))

        return after


def attend_in_pieces(
    module: torch.nn.Module,
    q_BHLD: Tensor,
    k_BHkMD: Tensor,
    v_BHkMD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [B, L, H, D] of the last L of M tokens. On CPU torch's kernel without a mask takes a fraction of the
    time that it takes with one: so the keys before the piece and those of the piece are attended to apart."""
    past = k_BHkMD.shape[2] - q_BHLD.shape[2]
    part = attend(q_BHLD, k_BHkMD[:, :, past:], v_BHkMD[:, :, past:], scaling, causal=True)
    if past:
        part = merge(attend(q_BHLD, k_BHkMD[:, :, :past], v_BHkMD[:, :, :past], scaling), part)
    return part[0].to(q_BHLD.dtype).transpose(1, 2), None


AttentionInterface.register(IN_PIECES, attend_in_pieces)  # and no mask of that name: transformers makes none


def read_on(model: FotLlamaForCausalLM, ids_BL: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states [B, L, C] of tokens that see each other and all that the cache holds."""
    return model.model(input_ids=ids_BL.to(model.device), past_key_values=cache, use_cache=True).last_hidden_state


def token_losses(model: FotLlamaForCausalLM, hidden_BLC: Tensor, labels_BL: Tensor) -> Tensor:
    """Loss (nats) of every label: float64 [B, L], one row's logits at a time in float32."""
    rows = [
        functional.cross_entropy(model.lm_head(hidden_LC).float(), labels_L, reduction="none").double()
        for hidden_LC, labels_L in zip(hidden_BLC, labels_BL.to(hidden_BLC.device), strict=True)
    ]
    return torch.stack(rows)


def yarn_rope(model: FotLlamaForCausalLM, longest: int) -> LlamaRotaryEmbedding:
    """YaRN for texts of up to `longest` tokens; within the model's own length it is the model's RoPE."""
    made_for = model.config.max_position_embeddings
    if longest <= made_for:
        return model.model.rotary_emb
    return LlamaRotaryEmbedding(_with_rope(model, "yarn", longest / made_for)).to(model.device)


def ntk_rope(model: FotLlamaForCausalLM, tokens: int, longest: int) -> LlamaRotaryEmbedding:
    """Dynamic NTK's RoPE as it is in one call with a text of `tokens`, from its first token on."""
    made_for = model.config.max_position_embeddings
    if tokens <= made_for:
        return model.model.rotary_emb
    config = _with_rope(model, "dynamic", max(longest, tokens) / made_for)
    rope = LlamaRotaryEmbedding(model.config).to(model.device)  # its frequencies do not change with calls
    rope.inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, model.device, seq_len=tokens)
    return rope


def _with_rope(model: FotLlamaForCausalLM, rope_type: str, factor: float) -> FotLlamaConfig:
    config = deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": rope_type, "factor": factor}
    config.standardize_rope_params()  # the length it was made for is the configuration's
    return config


@contextmanager
def full_attention(model: FotLlamaForCausalLM, rope: LlamaRotaryEmbedding | None = None) -> Iterator[None]:
    """The model as it reads in pieces, with this RoPE in place of its own, for the block."""
    own_rope, own_attention = model.model.rotary_emb, model.config._attn_implementation
    model.model.rotary_emb = own_rope if rope is None else rope
    if model.device.type == "cpu":
        model.config._attn_implementation = IN_PIECES
    try:
        yield
    finally:
        model.model.rotary_emb, model.config._attn_implementation = own_rope, own_attention


def _pieces(length: int, edge: int = 0) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of a text; none lies on both sides of `edge`."""
    start = 0
    while start < length:
        end = min(start + PIECE, edge if start < edge else length)
        yield start, end
        start = end
