"""Rotary positions (RoPE) turned back: a key moves to an earlier position without its hidden state.

Shapes: B batch, Hk key/value heads, L tokens, D head size.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from fot_model.attention import wide_dtype


def rotation(rope: LlamaRotaryEmbedding, by_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, D] in float32 of RoPE's rotation by so many positions, without the scale that some kinds
    of RoPE give them."""
    cos, sin = rope(torch.empty(0, dtype=torch.float32, device=by_BL.device), by_BL)
    return cos / rope.attention_scaling, sin / rope.attention_scaling


def turn_back(keys_BHkLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Keys rotated back by these angles."""
    wide = keys_BHkLD.to(wide_dtype(keys_BHkLD))
    return (wide * cos_BLD[:, None] - rotate_half(wide) * sin_BLD[:, None]).to(keys_BHkLD.dtype)
