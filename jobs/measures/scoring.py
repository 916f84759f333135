"""The loss of windows of a text with what was read before them, for evaluations and for a model in training.

Shapes: B rows, c windows of L tokens each, T = c x L + 1 tokens of a text.
"""

import torch

from fot_model import FotCache, FotLlamaForCausalLM
from pipelines.batches.sampler import IGNORE


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
        given = {"past_key_values": cache, "last_context_length": local}
        if place >= context - scored:
            output = model(inputs_BL, shift_labels=labels_BL, reduction="none", skip_logits=True, **given)
            losses.append(output.loss.double().sum(1))
        else:
            model(inputs_BL, logits_to_keep=1, **given)
        cache.flush()
    return torch.stack(losses, dim=1)


def score_chain(model: FotLlamaForCausalLM, text_BT: torch.Tensor, local: int, device: torch.device) -> torch.Tensor:
    """The same of the last window, float64 [B, 1], for a Transformer-XL: every layer sees the window before, as in
    training. Windows further back than there are layers reach the last one no more, and are not read."""
    reach = min(count_windows(text_BT, local), model.config.num_hidden_layers + 1)
    plan = torch.arange(-1, reach - 1)[:, None]
    losses = []
    for text_T in text_BT:  # a row each window of the chain, one chain at a time
        tokens_RT = text_T[-reach * local - 1 :].unfold(0, local + 1, local).to(device)
        labels_RL = torch.full_like(tokens_RT[:, 1:], IGNORE)
        labels_RL[-1] = tokens_RT[-1, 1:]
        seen = {"plan": plan, "objective": "transformer_xl"}
        output = model(tokens_RT[:, :-1], shift_labels=labels_RL, reduction="none", skip_logits=True, **seen)
        losses.append(output.loss[-1:].double().sum(1))
    return torch.stack(losses)


def count_windows(text_BT: torch.Tensor, local: int) -> int:
    """c, where T = c x L + 1."""
    windows, last = divmod(text_BT.shape[1], local)
    assert last == 1, "whole windows and the last label"
    return windows
