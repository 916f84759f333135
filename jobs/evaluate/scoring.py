"""The loss of windows of a text with what was read before them, for evaluations and for a model in training.

Shapes: B rows, c windows of L tokens each, T = c x L + 1 tokens of a text, V vocabulary.
"""

import torch
from torch.nn import functional

from fot_model import FotCache, FotLlamaForCausalLM


def score(
    model: FotLlamaForCausalLM,
    text_BT: torch.Tensor,
    local: int,
    device: torch.device,
    cache: FotCache | None = None,
    scored: int = 1,
) -> torch.Tensor:
    """Loss (nats) of each of a text's last `scored` windows: float64 [B, scored]. To be called without gradients.

    `device`: where the model computes, though its parameters may lie elsewhere. `cache`: what was read before, by
    default nothing.
    """
    cache = FotCache(model.config) if cache is None else cache
    losses, context = [], count_windows(text_BT, local)
    for place in range(context):
        tokens_BT = text_BT[:, place * local : (place + 1) * local + 1].to(device)
        inputs_BL, labels_BL = tokens_BT[:, :-1], tokens_BT[:, 1:]
        counts = place >= context - scored
        kept = local if counts else 1
        output = model(inputs_BL, past_key_values=cache, last_context_length=local, logits_to_keep=kept)
        cache.flush()
        if counts:
            losses.append(_losses(output.logits, labels_BL))
    return torch.stack(losses, dim=1)


def score_chain(model: FotLlamaForCausalLM, text_BT: torch.Tensor, local: int, device: torch.device) -> torch.Tensor:
    """The same of the last window, float64 [B, 1], for a Transformer-XL: every layer sees the window before, as in
    training. Windows further back than there are layers reach the last one no more, and are not read."""
    reach = min(count_windows(text_BT, local), model.config.num_hidden_layers + 1)
    plan = torch.arange(-1, reach - 1)[:, None]
    losses = []
    for text_T in text_BT:  # a row each window of the chain, one chain at a time
        tokens_RT = text_T[-reach * local - 1 :].unfold(0, local + 1, local).to(device)
        logits_RLV = model(tokens_RT[:, :-1], plan=plan, objective="transformer_xl").logits
        losses.append(_losses(logits_RLV[-1:], tokens_RT[-1:, 1:]))
    return torch.stack(losses)


def count_windows(text_BT: torch.Tensor, local: int) -> int:
    """c, where T = c x L + 1."""
    windows, last = divmod(text_BT.shape[1], local)
    assert last == 1, "whole windows and the last label"
    return windows


def _losses(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Loss of each row [B], one row's logits at a time in float32."""
    rows = [
        functional.cross_entropy(logits_LV.float(), labels_L, reduction="none").double().sum()
        for logits_LV, labels_L in zip(logits_BLV, labels_BL, strict=True)
    ]
    return torch.stack(rows)
