"""Inference memory: keys and values of what left the local context, by memory layer.

A memory attends with queries [B, H, L, D] and answers with a partial attention (`attention.py`), which the layer merges
with the one over the local context: one softmax, as in training. `DenseMemory` attends to everything, exactly;
`TopKMemory` to the k keys of largest inner product with each query (paper, section 3.1). Both go through the keys in
chunks, so peak memory does not grow with what is remembered, and both append into buffers that double when full:
amortised O(1) a token.

Shapes: B batch, H query heads, Hk key/value heads, G = H / Hk, L local tokens, N = G * L, M tokens in memory, D head
size, K kept.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fot_model.attention import MASKED, Partial, attend, is_fused, merge, wide_dtype

CHUNK = 4096  # keys a step, at most
SCORES = 2**24  # scores a step, at most, where they are written out; and numbers in the values picked by a top-k search


class Memory(Protocol):
    """What a memory layer asks of a memory. Every row of the batch holds the same number of tokens."""

    def append(self, layer: int, k_BHkLD: Tensor, v_BHkLD: Tensor, seen_BL: Tensor | None = None) -> None:
        """Add L tokens' keys (as position 0) and values. `seen_BL`: bool, False for padding, which stays hidden."""

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        """Attention to the layer's memory; None while it is empty."""

    def __len__(self) -> int:
        """Tokens in memory."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def reset(self) -> None:
        """Forget everything."""

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was: beams are reordered, rows dropped or repeated."""

    def hide(self, seen_BM: Tensor) -> None:
        """Hide the tokens where `seen_BM` (bool) is False."""

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, to be saved: by layer `N.keys` and `N.values` [B, Hk, M, D], and where there is padding
        `N.seen` [B, 1, M, 1]."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` gave, instead of what is held."""


class GrowingBuffer:
    """A tensor [B, Hk, M, D] that grows along M, by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._held: Tensor | None = None

    def append(self, new_BHkLD: Tensor) -> None:
        start, end = self.length, self.length + new_BHkLD.shape[2]
        if self._held is None or self._held.shape[2] < end:
            B, Hk, _, D = new_BHkLD.shape
            grown = (new_BHkLD if self._held is None else self._held).new_empty(B, Hk, max(end, 2 * start), D)
            if self._held is not None:
                grown[:, :, :start] = self._held[:, :, :start]
            self._held = grown
        assert self._held.shape[0] == new_BHkLD.shape[0], "another number of rows"
        if self._held.is_inference() and not torch.is_inference_mode_enabled():
            self._held = self._held.clone()  # torch lets nothing be written into it any more
        self._held[:, :, start:end] = new_BHkLD.detach()
        self.length = end

    def view(self, start: int = 0, end: int | None = None) -> Tensor:
        """Tokens `start` to `end` (to the last), without a copy."""
        assert self._held is not None, "nothing was appended"
        return self._held[:, :, start : self.length if end is None else end]

    def select(self, rows: Tensor) -> None:
        same = torch.arange(len(rows), device=rows.device)
        if self._held is not None and not (len(rows) == self._held.shape[0] and torch.equal(rows, same)):
            self._held = self.view().index_select(0, rows.to(self._held.device))


class LayerMemory:
    """One layer's keys and values, and which of them are no padding (kept from the first padding on)."""

    def __init__(self) -> None:
        self.keys, self.values = GrowingBuffer(), GrowingBuffer()
        self._seen: GrowingBuffer | None = None

    def append(self, k_BHkLD: Tensor, v_BHkLD: Tensor, seen_BL: Tensor | None) -> None:
        B, _, L, _ = k_BHkLD.shape
        if seen_BL is not None and self._seen is None:
            self._seen = GrowingBuffer()
            self._seen.append(torch.ones(B, 1, self.keys.length, 1, dtype=torch.bool, device=k_BHkLD.device))
        if self._seen is not None:
            if seen_BL is None:
                seen_BL = torch.ones(B, L, dtype=torch.bool, device=k_BHkLD.device)
            self._seen.append(seen_BL[:, None, :, None].to(k_BHkLD.device))
        self.keys.append(k_BHkLD)
        self.values.append(v_BHkLD)

    def hide(self, seen_BM: Tensor) -> None:
        self._seen = GrowingBuffer()
        self._seen.append(seen_BM[:, None, :, None].to(self.keys.view().device))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys and values [B, Hk, <= size, D] as held, seen [B, 1, 1, <= size] or None."""
        for start in range(0, self.keys.length, size):
            end = min(start + size, self.keys.length)
            keys, values = self.keys.view(start, end), self.values.view(start, end)
            seen = None if self._seen is None else self._seen.view(start, end).transpose(2, 3)
            yield keys, values, seen

    def buffers(self) -> dict[str, GrowingBuffer]:
        held = {"keys": self.keys, "values": self.values}
        return held if self._seen is None else {**held, "seen": self._seen}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "LayerMemory":
        memory = cls()
        seen = tensors.get("seen")
        memory.append(tensors["keys"], tensors["values"], None if seen is None else seen[:, 0, :, 0])
        return memory


class DenseMemory:
    """Exact attention to every token (`Memory`). `dtype`: number type of keys and values held, by default the
    model's; they are attended to in the model's."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._layers: dict[int, LayerMemory] = {}

    def __len__(self) -> int:
        return next((layer.keys.length for layer in self._layers.values()), 0)

    def append(self, layer: int, k_BHkLD: Tensor, v_BHkLD: Tensor, seen_BL: Tensor | None = None) -> None:
        dtype = self.dtype or k_BHkLD.dtype
        self._layers.setdefault(layer, LayerMemory()).append(k_BHkLD.to(dtype), v_BHkLD.to(dtype), seen_BL)

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        merged = None
        if layer in self._layers:
            size = CHUNK if is_fused(q_BHLD) else min(CHUNK, max(1, SCORES // q_BHLD[..., 0].numel()))
            copies = torch.is_grad_enabled()  # autograd keeps them, and the buffer will be written to again
            for keys, values, seen in self._layers[layer].chunks(size):
                keys, values = (x.to(q_BHLD.dtype, copy=copies) for x in (keys, values))
                part = attend(q_BHLD, keys, values, scale, seen=seen)
                merged = part if merged is None else merge(merged, part)
        return merged

    def truncate(self, length: int) -> None:
        assert length >= 0, length
        if length == 0:
            self.reset()  # another number of rows may come next
        for layer in self._layers.values():
            for buffer in layer.buffers().values():
                buffer.length = min(length, buffer.length)

    def reset(self) -> None:
        self._layers.clear()

    def select(self, rows: Tensor) -> None:
        for layer in self._layers.values():
            for buffer in layer.buffers().values():
                buffer.select(rows)

    def hide(self, seen_BM: Tensor) -> None:
        for layer in self._layers.values():
            layer.hide(seen_BM)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": buffer.view()
            for number, layer in self._layers.items()
            for name, buffer in layer.buffers().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, name = key.split(".")
            layers.setdefault(int(number), {})[name] = (
                tensor if name == "seen" else tensor.to(self.dtype or tensor.dtype)
            )
        self._layers = {number: LayerMemory.of(tensors) for number, tensors in layers.items()}


class TopKMemory(DenseMemory):
    """Attention to the `k` keys of largest inner product with each query of each head, found exactly (`Memory`)."""

    def __init__(self, k: int = 128, dtype: torch.dtype | None = None) -> None:
        if type(k) is not int or k < 1:
            raise ValueError(f"k is {k!r}: give a whole number of keys, at least 1")
        super().__init__(dtype)
        self.k = k

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        if len(self) <= self.k or layer not in self._layers:
            return super().attend(layer, q_BHLD, scale)
        B, H, _, _ = q_BHLD.shape
        queries = max(1, SCORES // (B * H * max(CHUNK + self.k, self.k * q_BHLD.shape[3])))
        with torch.autocast(q_BHLD.device.type, enabled=False):
            parts = [self._attend(self._layers[layer], q, scale) for q in q_BHLD.split(queries, dim=2)]
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, dim=2), torch.cat(lse, dim=2)

    def _attend(self, memory: LayerMemory, q_BHLD: Tensor, scale: float) -> Partial:
        Hk, D = memory.keys.view().shape[1], q_BHLD.shape[3]
        q_BHkND = q_BHLD.unflatten(1, (Hk, -1)).flatten(2, 3)  # N = G * L queries share a head of keys
        best = q_BHkND.new_empty(*q_BHkND.shape[:3], 0, dtype=wide_dtype(q_BHLD))
        places = torch.empty(best.shape, dtype=torch.long, device=best.device)
        start = 0
        for keys, _, seen in memory.chunks(CHUNK):
            keys = keys.to(best.dtype, copy=torch.is_grad_enabled())
            scores = (q_BHkND.to(best.dtype) @ keys.transpose(-1, -2)) * scale
            if seen is not None:
                scores = scores.masked_fill(~seen, MASKED)
            here = torch.arange(start, start + keys.shape[2], device=best.device).expand(scores.shape)
            best, kept = torch.cat([best, scores], dim=-1).topk(min(self.k, best.shape[-1] + scores.shape[-1]))
            places = torch.cat([places, here], dim=-1).gather(-1, kept)
            start += keys.shape[2]
        lse_BHkN = best.logsumexp(-1)
        weights_BHkNK = (best - lse_BHkN[..., None]).exp().to(q_BHLD.dtype)
        values_BHkMD = memory.values.view()
        picked_BHkNKD = values_BHkMD.gather(2, places.flatten(2)[..., None].expand(-1, -1, -1, D))
        picked_BHkNKD = picked_BHkNKD.unflatten(2, places.shape[2:]).to(q_BHLD.dtype)
        out_BHkND = (weights_BHkNK[..., None, :] @ picked_BHkNKD)[..., 0, :]
        return out_BHkND.reshape(q_BHLD.shape), lse_BHkN.reshape(q_BHLD.shape[:3])
