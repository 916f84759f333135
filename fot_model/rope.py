"""Rotary positions (RoPE), and their turning back: a key moves to an earlier position without its hidden state.

Shapes: B batch, H query heads, Hk key/value heads, L tokens, D head size, F = D / 2 frequencies.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from fot_model.attention import wide_dtype


def rotation(rope: LlamaRotaryEmbedding, by_BL: Tensor, positions_used: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, D] in float32 of RoPE's rotation by so many positions, without the scale that some kinds
    of RoPE give them. `positions_used`: on their number some kinds' frequencies depend."""
    if "dynamic" in rope.rope_type or rope.rope_type == "longrope":
        rope(torch.empty(0, device=by_BL.device), by_BL.new_full((1, 1), positions_used - 1))  # sets the frequencies
    angles_BLF = by_BL[..., None].float() * rope.inv_freq.to(by_BL.device, torch.float32)
    angles_BLD = torch.cat([angles_BLF, angles_BLF], dim=-1)
    return angles_BLD.cos(), angles_BLD.sin()


def turn(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Queries or keys rotated by these angles, as transformers rotates them."""
    return x_BHLD * cos_BLD[:, None] + rotate_half(x_BHLD) * sin_BLD[:, None]


def turn_back(keys_BHkLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Keys rotated back by these angles."""
    wide = keys_BHkLD.to(wide_dtype(keys_BHkLD))
    cos_B1LD, sin_B1LD = cos_BLD[:, None].to(wide.device), sin_BLD[:, None].to(wide.device)
    return (wide * cos_B1LD - rotate_half(wide) * sin_B1LD).to(keys_BHkLD.dtype)
