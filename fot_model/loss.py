"""The head of a language model, and a next-token loss that never holds the logits of all tokens.

Some tokens at a time get their logits, losses and, where they will be asked for, gradients. Of these the sums are
kept, in float32 or wider, so the backward pass only multiplies them and computes nothing again. A step costs the same
products as with all logits at once. In memory it costs `ENTRIES` numbers two or three times over, in place of three
float32 copies of N x V; the gradients of head and hidden states are there from the forward pass on. A gradient that
nobody needs (a frozen head's) is not computed.

torch's `linear_cross_entropy` works in this way too, but gives a bfloat16 model a sum rounded to bfloat16.

Shapes: N tokens with a label, n of them at once, C hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fot_model.attention import wide_dtype

IGNORE = -100  # label of a token that has no loss
ENTRIES = 2**24  # logits at once

Reduction = Literal["sum", "none"]


class LmHead(nn.Linear):
    """From hidden states to logits, as any linear layer; with labels, to the loss. It is reached through the module's
    call, so that what gathers or moves a module's weights when it is called (ZeRO-3, FSDP, offloading) does so here."""

    @classmethod
    def adopt(cls, head: nn.Module) -> None:
        """Make a LLaMA's head one of this class, with the weights it has; another kind of head stays what it is."""
        if type(head) is nn.Linear:
            head.__class__ = cls

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Logits [..., V]; with labels [...] the sum of their losses (nats), or the loss of each, in float32 or wider.

        A `none` that is to be differentiated holds all logits.
        """
        return super().forward(hidden) if labels is None else self._loss(hidden, labels, reduction)

    @torch.compiler.disable
    def _loss(self, hidden: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
        if type(self.weight) not in (Tensor, nn.Parameter):  # quantized, or shards that cannot be taken apart here
            logits = super().forward(hidden).flatten(0, -2)
            losses = functional.cross_entropy(logits.to(wide_dtype(logits)), labels.flatten(), reduction=reduction)
            return losses if reduction == "sum" else losses.view(labels.shape)
        seen = labels != IGNORE
        hidden_NC, weight_VC, labels_N = hidden[seen], self.weight, labels[seen]
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_NC, weight_VC = hidden_NC.to(dtype), weight_VC.to(dtype)
        with torch.autocast(device, enabled=False):
            if torch.is_grad_enabled() and (hidden_NC.requires_grad or weight_VC.requires_grad):
                if reduction == "sum":
                    return _SummedLoss.apply(hidden_NC, weight_VC, labels_N)
                logits_NV = functional.linear(hidden_NC, weight_VC).to(wide_dtype(hidden_NC))
                losses_N = functional.cross_entropy(logits_NV, labels_N, reduction="none")
            else:
                parts = [-of_labels for _, of_labels, _ in _log_probabilities(hidden_NC, weight_VC, labels_N)]
                losses_N = torch.cat([hidden_NC.new_empty(0, dtype=wide_dtype(hidden_NC)), *parts])
        if reduction == "sum":
            return losses_N.sum()
        return losses_N.new_zeros(labels.shape).masked_scatter(seen, losses_N)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NC, weight_VC, labels_N)
        loss, ctx.gradients = _loss_and_gradients(hidden_NC, weight_VC, labels_N, *ctx.needs_input_grad[:2])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NC, weight_VC, labels_N = ctx.saved_tensors
        if ctx.gradients is None:  # a second time through a retained graph
            _, ctx.gradients = _loss_and_gradients(hidden_NC, weight_VC, labels_N, *ctx.needs_input_grad[:2])
        (of_hidden_NC, of_weight_VC), ctx.gradients = ctx.gradients, None
        return (
            None if of_hidden_NC is None else of_hidden_NC.mul_(grad).to(hidden_NC.dtype),
            None if of_weight_VC is None else of_weight_VC.mul_(grad).to(weight_VC.dtype),
            None,
        )


def _loss_and_gradients(
    hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The sum of all losses, and its gradients where they are wanted."""
    wide = wide_dtype(hidden_NC)
    loss = hidden_NC.new_zeros((), dtype=wide)
    of_hidden_NC = torch.empty_like(hidden_NC, dtype=wide) if wants_hidden else None
    of_weight_VC = torch.zeros_like(weight_VC, dtype=wide) if wants_weight else None
    for part, of_labels_n, log_p_nV in _log_probabilities(hidden_NC, weight_VC, labels_N):
        loss -= of_labels_n.sum()
        of_logits_nV = log_p_nV.exp_()
        of_logits_nV[torch.arange(len(of_labels_n), device=loss.device), labels_N[part]] -= 1
        of_logits_nV = of_logits_nV.to(weight_VC.dtype)
        if of_hidden_NC is not None:
            of_hidden_NC[part] = of_logits_nV @ weight_VC
        if of_weight_VC is not None and wide == weight_VC.dtype:
            of_weight_VC.addmm_(of_logits_nV.T, hidden_NC[part])
        elif of_weight_VC is not None:
            of_weight_VC += of_logits_nV.T @ hidden_NC[part]
    return loss, (of_hidden_NC, of_weight_VC)


def _log_probabilities(
    hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens at a time: which, the log-probabilities of their labels [n], and all of them [n, V]."""
    at_once = max(1, ENTRIES // len(weight_VC))
    for first in range(0, len(labels_N), at_once):
        part = slice(first, first + at_once)
        logits_nV = hidden_NC[part] @ weight_VC.T
        log_p_nV = logits_nV.log_softmax(-1, dtype=wide_dtype(logits_nV))
        del logits_nV
        yield part, log_p_nV.gather(1, labels_N[part, None])[:, 0], log_p_nV
