"""Rotary positions (RoPE) turned back: a key moves to an earlier position without its hidden state.

Shapes: B batch, Hk key/value heads, L tokens, D head size.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from fot_model.attention import wide_dtype


def rotation(rope: LlamaRotaryEmbedding, by_BL: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, D] in float32 of RoPE's rotation by so many positions, without the scale that some kinds
    of RoPE give them. `window`: positions in use, on which some kinds' frequencies depend."""
    with_last = torch.cat([by_BL, by_BL.new_full((by_BL.shape[0], 1), window - 1)], dim=1)
    cos, sin = rope(torch.empty(0, dtype=torch.float32, device=by_BL.device), with_last)
    return cos[:, :-1] / rope.attention_scaling, sin[:, :-1] / rope.attention_scaling


def turn_back(keys_BHkLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Keys rotated back by these angles."""
    wide = keys_BHkLD.to(wide_dtype(keys_BHkLD))
    return (wide * cos_BLD[:, None] - rotate_half(wide) * sin_BLD[:, None]).to(keys_BHkLD.dtype)
