"""What a layer's attention to far tokens is worth: the model computed with one layer changed, for each layer in turn.

In full attention a layer sees all tokens before; `near_mask` leaves it those of a window behind each token, and the
first token of all, on which heads rest that have nothing to do. Layers below the changed one are computed once for all
of them, so the N layers cost about N / 2 forward passes, and memory for no more than one.

Shapes: L tokens, C hidden size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def near_mask(tokens: int, local: int, like: Tensor) -> Tensor:
    """What is added to scores [1, 1, L, L], so that a token sees itself, the `local` - 1 before it, and the first."""
    back_LL = torch.arange(tokens, device=like.device)[:, None] - torch.arange(tokens, device=like.device)
    seen_LL = (back_LL >= 0) & (back_LL < local)
    seen_LL[:, 0] = True
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(seen_LL, dtype=like.dtype).masked_fill_(~seen_LL, lowest)[None, None]


@torch.no_grad()
def one_changed(
    model: LlamaForCausalLM, ids_1L: Tensor, usual: Tensor | None, changed: Tensor | None
) -> Iterator[Tensor]:
    """The last hidden states [1, L, C], normed: for each layer with the mask `changed` in it and `usual` in all others,
    and then once more with `usual` in all. None is the causal mask."""
    inner = model.model
    below_1LC = inner.embed_tokens(ids_1L)
    angles = inner.rotary_emb(below_1LC, torch.arange(ids_1L.shape[1], device=ids_1L.device)[None])
    for number, layer in enumerate(inner.layers):
        hidden_1LC = layer(below_1LC, attention_mask=changed, position_embeddings=angles)
        for above in inner.layers[number + 1 :]:
            hidden_1LC = above(hidden_1LC, attention_mask=usual, position_embeddings=angles)
        yield inner.norm(hidden_1LC)
        below_1LC = layer(below_1LC, attention_mask=usual, position_embeddings=angles)
    yield inner.norm(below_1LC)
