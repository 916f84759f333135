"""Inference memory: the keys and values of everything read so far, one pair of growing buffers a memory layer.

`DenseMemory` attends exactly to all of it. Attention runs over chunks of keys that are merged by log-sum-exp, so peak
memory does not grow with what is remembered; appending is amortised O(1) a token, by doubling.

Shapes: B batch, H query heads, Hk key/value heads, L local tokens, M tokens in memory, D head size.
"""

import torch
from torch import Tensor

CHUNK = 1024  # keys a step: bounds the score matrix at [B, H, L, CHUNK]


def repeat_heads(x_BHkLD: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: each key/value head serves `heads // Hk` query heads. Returns [B, H, L, D]."""
    return x_BHkLD.repeat_interleave(heads // x_BHkLD.shape[1], dim=1)


def partial_attention(
    q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: its output [B, H, L, D] and log-sum-exp [B, H, L], to be merged with others.

    `causal`: query i sees keys 0 to i.
    """
    if q_BHLD.device.type == "cpu" and not torch.is_grad_enabled():
        # The fused kernel that also gives the log-sum-exp: no score matrix, 13 to 25 times faster (benchmarks/LOG.md).
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q_BHLD, k_BHMD, v_BHMD, 0.0, causal, scale=scale)
    scores_BHLM = (q_BHLD @ k_BHMD.transpose(-1, -2)).float() * scale
    if causal:
        seen_LM = torch.ones(scores_BHLM.shape[-2:], dtype=torch.bool, device=q_BHLD.device).tril()
        scores_BHLM = scores_BHLM.masked_fill(~seen_LM, float("-inf"))
    lse_BHL = scores_BHLM.logsumexp(-1)
    weights_BHLM = (scores_BHLM - lse_BHL[..., None]).exp()
    return weights_BHLM.to(v_BHMD.dtype) @ v_BHMD, lse_BHL


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two partial attentions over disjoint keys into the one over their union."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


class DenseMemory:
    """Keys and values of every token read so far, by memory layer; all rows of the batch hold the same number."""

    def __init__(self) -> None:
        self._length: dict[int, int] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Tokens in memory (of the first memory layer; between forward passes all layers hold the same)."""
        return next(iter(self._length.values()), 0)

    def append(self, layer: int, k_BHkLD: Tensor, v_BHkLD: Tensor) -> None:
        """Add L tokens' keys (as position 0: without rotation) and values."""
        start = self._length.get(layer, 0)
        end = start + k_BHkLD.shape[2]
        for buffers, new in ((self._keys, k_BHkLD), (self._values, v_BHkLD)):
            old = buffers.get(layer)
            if old is None or old.shape[2] < end:
                B, Hk, _, D = new.shape
                grown = new.new_empty(B, Hk, max(end, 2 * start), D)
                if old is not None:
                    grown[:, :, :start] = old[:, :, :start]
                buffers[layer] = grown
            buffers[layer][:, :, start:end] = new.detach()
        self._length[layer] = end

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """Attention to all of the layer's memory as (output, log-sum-exp); None while it is empty."""
        heads = q_BHLD.shape[1]
        merged = None
        for start in range(0, self._length.get(layer, 0), CHUNK):
            end = min(start + CHUNK, self._length[layer])
            keys = repeat_heads(self._keys[layer][:, :, start:end], heads)
            values = repeat_heads(self._values[layer][:, :, start:end], heads)
            part = partial_attention(q_BHLD, keys, values, scale)
            merged = part if merged is None else merge(merged, part)
        return merged

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        assert length >= 0, length
        self._length = {layer: min(length, held) for layer, held in self._length.items()}

    def reset(self) -> None:
        """Forget everything (single-document use: between documents)."""
        self._length.clear()
        self._keys.clear()
        self._values.clear()
