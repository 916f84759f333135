"""The loss of held-out windows with what was read before them, for evaluations and for a model in training.

Shapes: B windows, L tokens a window, T = L + 1.
"""

import torch

from fot_model import FotCache, FotLlamaForCausalLM
from jobs.evaluate.windows import Window, read_windows
from pipelines.dataset import TokenDataset
from pipelines.sampler import IGNORE


def score(
    model: FotLlamaForCausalLM,
    dataset: TokenDataset,
    windows: list[Window],
    context: int,
    local: int,
    device: torch.device,
    cache: FotCache | None = None,
    scored: int = 1,
) -> torch.Tensor:
    """Loss (nats) of the last `scored` of the `context` windows that end with each of the given: float64 [B, scored].
    To be called without gradients.

    `device`: where the model computes, though its parameters may lie elsewhere. `cache`: what was read before, by
    default nothing.
    """
    cache = FotCache(model.config) if cache is None else cache
    losses = []
    for back in range(context - 1, -1, -1):
        here = [Window(window.document, window.start - back * local) for window in windows]
        tokens_BT = torch.from_numpy(read_windows(dataset, here, local + 1)).to(device)
        inputs_BL, labels_BL = tokens_BT[:, :-1], tokens_BT[:, 1:]
        given = {"past_key_values": cache, "last_context_length": local}
        if back < scored:
            output = model(inputs_BL, shift_labels=labels_BL, reduction="none", skip_logits=True, **given)
            losses.append(output.loss.double().sum(1))
        else:
            model(inputs_BL, logits_to_keep=1, **given)
        cache.flush()
    return torch.stack(losses, dim=1)


def score_chain(
    model: FotLlamaForCausalLM,
    dataset: TokenDataset,
    windows: list[Window],
    context: int,
    local: int,
    device: torch.device,
) -> torch.Tensor:
    """The same of the last window, float64 [B, 1], for a Transformer-XL: every layer sees the window before, as in
    training. Windows further back than there are layers reach the last one no more, and are not read."""
    reach = min(context, model.config.num_hidden_layers + 1)
    plan = torch.arange(-1, reach - 1)[:, None]
    losses = []
    for window in windows:  # a row each window of the chain, one chain at a time
        chain = [Window(window.document, window.start - back * local) for back in range(reach - 1, -1, -1)]
        tokens_RT = torch.from_numpy(read_windows(dataset, chain, local + 1)).to(device)
        labels_RL = torch.full_like(tokens_RT[:, 1:], IGNORE)
        labels_RL[-1] = tokens_RT[-1, 1:]
        seen = {"plan": plan, "objective": "transformer_xl"}
        output = model(tokens_RT[:, :-1], shift_labels=labels_RL, reduction="none", skip_logits=True, **seen)
        losses.append(output.loss[-1:].double().sum(1))
    return torch.stack(losses)
