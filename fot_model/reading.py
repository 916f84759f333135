"""Reading inputs of any length: in windows through the local context, and from there into memory.

A full local context moves its first half to memory, so what is near is always at hand, and the windows do not depend on
how the input was split into calls. With `kept_local` (`last_context_length`) the windows follow LongLLaMA's code: of an
input longer than that, all but its last `kept_local` tokens go to memory window by window.

Shapes: B batch, L tokens, P tokens read before, C hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaModel

from fot_model.cache import FotCache
from fot_model.config import FotLlamaConfig


def read(
    model: LlamaModel,
    embeddings_BLC: Tensor,
    seen_BL: Tensor | None,
    cache: FotCache,
    kept_local: int | None,
    needed: int,
    **kwargs: Any,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Go on from what the cache holds. Returns the last hidden states of the last `needed` tokens [B, needed, C], and
    those of every layer where they were asked for. `seen_BL` is False for padding."""
    if kept_local is not None:
        embeddings_BLC, seen_BL = with_tail(cache, embeddings_BLC, seen_BL, kept_local, model.config.window)
    else:
        cache.settle()
    B, length, _ = embeddings_BLC.shape
    outputs = []
    for start, end in windows(cache, length, model.config.window, kept_local):
        seen = None if seen_BL is None else seen_BL[:, start:end]
        positions = cache.enter(seen, end - start, B, embeddings_BLC.device)
        output = model(
            inputs_embeds=embeddings_BLC[:, start:end],
            attention_mask=cache.seen_BL,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        )
        if end > length - needed:
            outputs.append(output)
    hidden_BLC = torch.cat([output.last_hidden_state for output in outputs], dim=1)[:, -needed:]
    if outputs[0].hidden_states is None:
        return hidden_BLC, None
    by_layer = zip(*(output.hidden_states for output in outputs), strict=True)
    return hidden_BLC, tuple(torch.cat(states, dim=1)[:, -needed:] for states in by_layer)


def windows(cache: FotCache, length: int, window: int, kept_local: int | None) -> Iterator[tuple[int, int]]:
    """Split new tokens into (start, end) that fit the local context, making room in it before each. A full one keeps
    its last `kept_local` tokens, half of it if None."""
    start = 0
    if kept_local is not None and length > kept_local:
        cache.evict(cache.local_length)
        for start in range(0, length - kept_local, window):
            yield start, min(start + window, length - kept_local)
            cache.evict(cache.local_length)
        start = length - kept_local
    while start < length:
        if cache.local_length >= window:
            cache.evict(cache.local_length - min(kept_local or window // 2, window - 1))
        end = min(length, start + window - cache.local_length)
        yield start, end
        start = end


def with_tail(
    cache: FotCache, embeddings_BLC: Tensor, seen_BL: Tensor | None, kept_local: int, window: int
) -> tuple[Tensor, Tensor | None]:
    """The input with what is to be read again before it.

    With `kept_local` the windows depend on where the input ends. So that a prompt in several calls of more than one
    token equals one call, such a call reads again what is not yet in whole windows: at most a window and the last
    context of the prompt, and what was generated since.
    """
    L = embeddings_BLC.shape[1]
    if L > 1 and (tail := cache.replay()) is not None:
        past_BLC, past_seen_BL = tail
        new_seen_BL = torch.ones_like(past_seen_BL[:, :1]).expand(-1, L) if seen_BL is None else seen_BL
        embeddings_BLC = torch.cat([past_BLC, embeddings_BLC], dim=1)
        seen_BL = torch.cat([past_seen_BL, new_seen_BL], dim=1)
        seen_BL = None if seen_BL.all() else seen_BL
    whole = max(0, embeddings_BLC.shape[1] - kept_local) // window * window if L > 1 else 0
    cache.note(embeddings_BLC[:, whole:], None if seen_BL is None else seen_BL[:, whole:])
    return embeddings_BLC, seen_BL


def check_cache(cache: Cache, rows: int, config: FotLlamaConfig) -> FotCache:
    """Raises ValueError for a cache without memory, of another model, or of another number of rows than the input."""
    if not isinstance(cache, FotCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: give a FotCache(model.config), or none")
    if not cache.fits(config):
        raise ValueError("past_key_values is of a model with other layers: give FotCache(model.config) of this one")
    if cache.rows not in (None, rows):
        raise ValueError(
            f"past_key_values holds {cache.rows} rows, the input has {rows}: "
            f"past_key_values.batch_repeat_interleave(n) makes n of each"
        )
    return cache


def check_rows(input_ids: Any) -> None:
    """Raises ValueError for lists in place of a tensor, and for one row without its batch."""
    if isinstance(input_ids, Tensor) and input_ids.dim() != 2:
        raise ValueError(f"input_ids {list(input_ids.shape)}: give [B, L], one row too (input_ids[None])")
    if input_ids is not None and not isinstance(input_ids, Tensor):
        lengths = sorted({len(row) for row in input_ids if hasattr(row, "__len__")})
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__} of rows of {lengths} tokens: give one tensor [B, L], shorter "
            f"rows padded on the left, with their attention_mask"
        )


def check_positions(position_ids_BL: Tensor | None, seen_BL: Tensor | None) -> None:
    """Raises ValueError for positions that do not count on from token to token; where they begin does not matter."""
    if position_ids_BL is None:
        return
    on_BL = position_ids_BL.diff(dim=1) == 1
    if seen_BL is not None:
        on_BL = on_BL | ~(seen_BL[:, 1:] & seen_BL[:, :-1])
    if not on_BL.all():
        raise ValueError("position_ids that jump: reading counts positions in the local context, leave them out")


@torch.compiler.disable  # it looks at values
def check_unpadded(input_ids_BL: Tensor, pad: int | None, bos: int | None) -> None:
    """Raises ValueError where some rows begin with several padding tokens and no mask says that these are padding."""
    if pad is None or pad == bos or input_ids_BL.shape[0] < 2 or input_ids_BL.shape[1] < 2:
        return
    padded_B = (input_ids_BL[:, :2] == pad).all(1)
    if padded_B.any() and not padded_B.all():
        raise ValueError(
            f"rows {padded_B.nonzero().flatten().tolist()} begin with padding (token {pad}), so lengths are unequal, "
            f"but there is no attention_mask: give the tokenizer's"
        )


@torch.compiler.disable  # it looks at values
def padding(attention_mask: Tensor | None, B: int, L: int, past: int) -> tuple[Tensor | None, Tensor | None]:
    """Bool [B, past] and [B, L], False where a token read before or a new one is padding; None where the mask says
    nothing of the past, and where no new token is padding. Raises ValueError for a mask of another shape."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape not in ((B, L), (B, past + L)):
        whole = f" or [{B}, {past + L}] with what was read before" if past else ""
        raise ValueError(f"attention_mask {list(attention_mask.shape)}: give [{B}, {L}]{whole}, 0 for padding")
    past_BP, seen_BL = attention_mask.bool().tensor_split([attention_mask.shape[1] - L], dim=1)
    return past_BP if past_BP.shape[1] else None, None if seen_BL.all() else seen_BL
