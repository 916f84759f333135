"""Attention over some of the keys, to be merged with attention over others by log-sum-exp.

The softmax over a union of keys follows from the softmax over each part: with outputs o_i and log-sum-exps l_i, the
union has l = log(sum_i exp l_i) and o = sum_i exp(l_i - l) o_i. Its gradient follows a part at a time too: with the
union's o and l in place of the part's own, a flash attention's backward pass gives the part's share. So one softmax
over the local context and over memory or additional contexts needs no tensor that holds all keys or all scores.

On CPU torch's fused kernel does a part (no score matrix); elsewhere, and where torch is to differentiate a part by
itself, the formula written out does, with the part's score matrix.

Shapes: B batch, H query heads, Hk key/value heads, G = H / Hk, L queries, M keys, D head size.
"""

import torch
from torch import Tensor

MASKED = -3e4  # added to the score of a hidden key: its weight is 0 beside any seen one, and nothing becomes NaN

Partial = tuple[Tensor, Tensor]  # output [B, H, L, D], log-sum-exp [B, H, L]; merged ones in float32 or wider


def attend(
    q_BHLD: Tensor, k_BHkMD: Tensor, v_BHkMD: Tensor, scale: float, causal: bool = False, seen: Tensor | None = None
) -> Partial:
    """Attention to these keys alone. `causal`: query i sees keys 0 to i (L = M). `seen`: bool of four dimensions,
    broadcast to [B, H, L, M], False hides a key; a query from which all are hidden gets a log-sum-exp near `MASKED`."""
    _check(q_BHLD, k_BHkMD, v_BHkMD, causal, seen)
    bias = _bias(q_BHLD, k_BHkMD.shape[2], causal, seen)
    if is_fused(q_BHLD, k_BHkMD, v_BHkMD):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Query heads that share their keys become queries of one head: the keys are read once.
        folds = not causal and bias is None
        q = _fold(q_BHLD, k_BHkMD.shape[1]) if folds else q_BHLD
        out, lse = kernel(q, k_BHkMD, v_BHkMD, 0.0, causal and bias is None, attn_mask=bias, scale=scale)
        return out.reshape(q_BHLD.shape), lse.reshape(q_BHLD.shape[:3])
    with torch.autocast(q_BHLD.device.type, enabled=False):
        scores_BHkGLM = _scores(q_BHLD, k_BHkMD, scale, causal, bias)
        lse_BHkGL = scores_BHkGLM.logsumexp(-1)
        weights_BHkGLM = (scores_BHkGLM - lse_BHkGL[..., None]).exp().to(v_BHkMD.dtype)
        return (weights_BHkGLM @ v_BHkMD[:, :, None]).flatten(1, 2), lse_BHkGL.flatten(1, 2)


def attend_backward(
    grad_BHLD: Tensor,
    q_BHLD: Tensor,
    k_BHkMD: Tensor,
    v_BHkMD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    scale: float,
    causal: bool = False,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values of a part, given output and log-sum-exp of the union it belongs to."""
    _check(q_BHLD, k_BHkMD, v_BHkMD, causal, seen)
    assert grad_BHLD.shape == out_BHLD.shape == q_BHLD.shape, (grad_BHLD.shape, out_BHLD.shape, q_BHLD.shape)
    assert lse_BHL.shape == q_BHLD.shape[:3], (lse_BHL.shape, q_BHLD.shape)
    bias = _bias(q_BHLD, k_BHkMD.shape[2], causal, seen)
    if _fused(q_BHLD):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        union = (out_BHLD, lse_BHL)
        return kernel(
            grad_BHLD, q_BHLD, k_BHkMD, v_BHkMD, *union, 0.0, causal and bias is None, attn_mask=bias, scale=scale
        )
    Hk = k_BHkMD.shape[1]
    wide = lse_BHL.dtype
    q, grad = (x.unflatten(1, (Hk, -1)).to(wide) for x in (q_BHLD, grad_BHLD))
    k, v = k_BHkMD[:, :, None].to(wide), v_BHkMD[:, :, None].to(wide)
    lse_BHkGL = lse_BHL.unflatten(1, (Hk, -1))
    weights_BHkGLM = (_scores(q_BHLD, k_BHkMD, scale, causal, bias) - lse_BHkGL[..., None]).exp()
    along_BHkGL = (grad_BHLD.to(wide) * out_BHLD).sum(-1).unflatten(1, (Hk, -1))
    grad_scores_BHkGLM = weights_BHkGLM * (grad @ v.transpose(-1, -2) - along_BHkGL[..., None]) * scale
    grad_q = (grad_scores_BHkGLM @ k).flatten(1, 2)
    grad_k = (grad_scores_BHkGLM.transpose(-1, -2) @ q).sum(2)
    grad_v = (weights_BHkGLM.transpose(-1, -2) @ grad).sum(2)
    return grad_q.to(q_BHLD.dtype), grad_k.to(k_BHkMD.dtype), grad_v.to(v_BHkMD.dtype)


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial attentions over disjoint keys into the one over their union, summed in float32."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32 or wider: what scores and sums of parts are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def is_fused(q_BHLD: Tensor, *others: Tensor) -> bool:
    """Whether torch's CPU kernel attends with these queries, keys and values: no score matrix is made."""
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHLD, *others))
    return _fused(q_BHLD) and not differentiated


def _check(q_BHLD: Tensor, k_BHkMD: Tensor, v_BHkMD: Tensor, causal: bool, seen: Tensor | None) -> None:
    """The kernel takes shapes on trust, and reads past the end of tensors that are too short."""
    (B, H, L, D), (_, Hk, M, _) = q_BHLD.shape, k_BHkMD.shape
    shapes = (tuple(q_BHLD.shape), tuple(k_BHkMD.shape), tuple(v_BHkMD.shape))
    assert shapes[1] == shapes[2] == (B, Hk, M, D), shapes
    assert H % Hk == 0, shapes
    assert L == M or not causal, shapes
    assert q_BHLD.dtype == k_BHkMD.dtype == v_BHkMD.dtype, (q_BHLD.dtype, k_BHkMD.dtype, v_BHkMD.dtype)
    if seen is not None:
        fits = zip(seen.shape, (B, H, L, M), strict=True)
        assert all(size in (1, whole) for size, whole in fits), (tuple(seen.shape), *shapes)


def _fused(q_BHLD: Tensor) -> bool:
    return q_BHLD.device.type == "cpu"


def _fold(q_BHLD: Tensor, Hk: int) -> Tensor:
    """[B, H, L, D] to [B, Hk, G * L, D]."""
    return q_BHLD.unflatten(1, (Hk, -1)).flatten(2, 3)


def _bias(q_BHLD: Tensor, keys: int, causal: bool, seen: Tensor | None) -> Tensor | None:
    if seen is None:
        return None
    if causal:
        seen = seen & _tril(keys, q_BHLD.device)
    return torch.zeros(seen.shape, dtype=q_BHLD.dtype, device=q_BHLD.device).masked_fill_(~seen, MASKED)


def _scores(q_BHLD: Tensor, k_BHkMD: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    """[B, Hk, G, L, M] in float32 or wider."""
    wide = wide_dtype(q_BHLD)
    q_BHkGLD, k_BHk1MD = q_BHLD.to(wide).unflatten(1, (k_BHkMD.shape[1], -1)), k_BHkMD.to(wide)[:, :, None]
    scores = q_BHkGLD @ k_BHk1MD.transpose(-1, -2) * scale
    if bias is not None:
        return scores + (bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (k_BHkMD.shape[1], -1)))
    return scores.masked_fill(~_tril(scores.shape[-1], scores.device), MASKED) if causal else scores


def _tril(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
