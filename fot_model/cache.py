"""`FotCache`: what a FoT model has read, as transformers' `past_key_values`.

It holds the local context (keys and values of every layer, positions 0 to W - 1) and the memory (keys and values of the
memory layers, for everything before). Tokens enter at the end of the local context and leave at its start, block by
block, into the memory: memory layers hand theirs over turned back to position 0, the other layers forget theirs, and
what stays moves down to the first positions.

Moving down turns no key: RoPE tells distances only, so queries and keys that come later are turned by as much more (the
lead) as those before have moved down. Not before the lead exceeds a window are keys turned back by it, so that a key is
rounded three times at most, when it enters, once between and when it leaves, however many times something left.

Shapes: B batch, Hk key/value heads, L tokens, P tokens read, D head size, C hidden size.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import cache_file
from fot_model.config import FotLlamaConfig
from fot_model.memory import DenseMemory, GrowingBuffer, Memory
from fot_model.rope import rotation, turn_back


class FotCache(DynamicCache):
    """Local context and memory of a model with this configuration. `memory`: by default a `DenseMemory` that holds
    keys and values as `config.mem_dtype`.

    Give it to `model(...)` or `model.generate(...)` as `past_key_values` and they continue from it. `copy.deepcopy`
    makes a second one that goes its own way: read a book once, ask many times.
    """

    def __init__(self, config: FotLlamaConfig, memory: Memory | None = None) -> None:
        super().__init__(config=config)
        self.memory: Memory = DenseMemory(config.memory_dtype) if memory is None else memory
        self.seen_BL: Tensor | None = None  # bool, False for padding, of the local context; None without padding
        self.angles: tuple[Tensor, Tensor] | None = None  # of new tokens, lead included [B or 1, L, D]; None without
        self._lead_B1: Tensor | None = None  # by how many positions more than their own keys are turned; None for 0
        self._window = config.window
        self._mem_layers = frozenset(config.mem_layers or [])
        self._turns_memory_layers = config.mem_positionals
        self._rope = LlamaRotaryEmbedding(config)
        self._left = len(self.memory)  # tokens that left the local context
        self._positions_used = 0  # positions used while the local context's keys were rotated
        self._tail = Tail()
        self._undo: Undo | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """All tokens read."""
        return self._left + self.local_length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers does, in the number type that is computed in: under autocast RoPE leaves keys in float32."""
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)

    @property
    def local_length(self) -> int:
        """Tokens in the local context."""
        return super().get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where new tokens stand in the local context."""
        return self.local_length

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None while nothing was read."""
        if not self.get_seq_length():
            return None
        tensors = [layer.keys for layer in self.layers if layer.is_initialized] or [*self.memory.state_dict().values()]
        return tensors[0].shape[0] if tensors else None

    def enter(self, seen_BL: Tensor | None, length: int, rows: int, device: torch.device) -> Tensor:
        """Make room for `length` new tokens; `seen_BL` is False where they are padding. Returns their positions
        [B or 1, length]: in the local context, padding not counted. `angles` are theirs until the next ones."""
        start = self.local_length
        self._positions_used = max(self._positions_used if start else 0, start + length)
        if seen_BL is not None or self.seen_BL is not None:
            all_seen = torch.ones(rows, start + length, dtype=torch.bool, device=device)
            past = all_seen[:, :start] if self.seen_BL is None else self.seen_BL
            self.seen_BL = torch.cat([past, all_seen[:, start:] if seen_BL is None else seen_BL], dim=1)
        positions = self._positions(start + length, device)[:, start:]
        self.angles = None
        if self._lead_B1 is not None:
            cos, sin = rotation(self._rope, positions + self._lead_B1.to(device), self._positions_used)
            self.angles = cos * self._rope.attention_scaling, sin * self._rope.attention_scaling
        return positions

    def hide(self, seen_BP: Tensor) -> None:
        """Hide what was read already, where `seen_BP` is False: those that come next neither see nor count it. Raises
        ValueError for a token that was padding when it was read and is to be seen now."""
        known_BP = self._known(seen_BP)
        if known_BP is None and seen_BP.all():
            return
        known_BP = torch.ones_like(seen_BP) if known_BP is None else known_BP
        if (seen_BP & ~known_BP).any():
            raise ValueError(
                "attention_mask shows tokens that were padding when they were read: give the mask that they were read "
                "with, or that of the new tokens alone"
            )
        if not (known_BP & ~seen_BP).any():
            return
        if self._left and len(self.memory):
            self.memory.hide(seen_BP[:, : self._left])
        length = self.local_length
        if length:
            before = self._positions(length, seen_BP.device)
            self.seen_BL = seen_BP[:, self._left :]
            back = before - self._positions(length, seen_BP.device)
            if back.any():  # what follows a hidden token moves down
                self._turn_back(rotation(self._rope, back, self._positions_used))
        self._tail.hide(seen_BP[:, seen_BP.shape[1] - len(self._tail) :])

    def evict(self, count: int) -> None:
        """Move the first `count` tokens of the local context to the memory."""
        length = self.local_length
        assert 0 <= count <= length, (count, length)
        if count == 0:
            return
        self._keep_local()
        device = self.layers[0].keys.device
        positions = self._positions(length, device)
        gone_BL = None if self.seen_BL is None else self.seen_BL[:, :count]
        lead_B1 = positions.new_zeros((1, 1)) if self._lead_B1 is None else self._lead_B1.to(device)
        back_to_start = rotation(self._rope, positions[:, :count] + lead_B1, self._positions_used)
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys, layer.values
            if number in self._mem_layers:
                gone = keys[:, :, :count]
                gone = turn_back(gone, *back_to_start) if self._turns(number) else gone
                self.memory.append(number, gone, values[:, :, :count], gone_BL)
            if count == length:
                layer.reset()
            else:
                layer.keys, layer.values = keys[:, :, count:].clone(), values[:, :, count:].clone()
        if self.seen_BL is not None:
            stays_BL = self.seen_BL[:, count:]
            self.seen_BL = None if stays_BL.all() else stays_BL
        self._left += count
        self._lead_B1 = None
        if count < length:
            self._lead_B1 = lead_B1 + (count if gone_BL is None else gone_BL.sum(1, keepdim=True))
            if self._lead_B1.max() > self._window:
                self._turn_back(rotation(self._rope, self._lead_B1, self._positions_used))
                self._lead_B1 = None

    def flush(self) -> None:
        """Move the whole local context to the memory: the next tokens start a new one (the next document)."""
        self.evict(self.local_length)
        self.settle()

    def settle(self) -> None:
        """Nothing read so far is to be replayed."""
        self._tail = Tail()

    def fits(self, config: FotLlamaConfig) -> bool:
        """Whether it has this model's layers and memory layers."""
        return (len(self.layers), self._mem_layers) == (config.num_hidden_layers, frozenset(config.mem_layers or []))

    def note(self, embeddings_BLC: Tensor, seen_BL: Tensor | None) -> None:
        """Keep the inputs of tokens that enter now, to be replayed."""
        self._tail.append(embeddings_BLC, seen_BL)

    def replay(self) -> tuple[Tensor, Tensor] | None:
        """Forget the tokens noted, and return their inputs [B, L, C] and seen [B, L]; None if there are none."""
        tail, self._tail = self._tail, Tail()
        if not len(tail):
            return None
        self.truncate(self.get_seq_length() - len(tail))
        return tail.inputs()

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens read. Where these reach only into the memory, the local context is
        empty afterwards."""
        if not 0 <= length <= self.get_seq_length():
            raise ValueError(f"truncate to {length} tokens: {self.get_seq_length()} were read")
        self._keep_local()
        self._tail = self._tail.before(len(self._tail) - (self.get_seq_length() - length))
        if length > self._left:
            super().crop(length - self.get_seq_length())
            self.seen_BL = None if self.seen_BL is None else self.seen_BL[:, : self.local_length]
            return
        if self._undo is not None and length < self._left and not self._undo.memory:
            self._undo.keep_memory(self.memory, length)
        super().reset()
        self.seen_BL = self._lead_B1 = None
        self.memory.truncate(length)
        self._left = length

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' way to forget the last tokens: `tokens_to_remove` is their number, negative."""
        self.truncate(self.get_seq_length() - abs(tokens_to_remove))

    @property
    def is_croppable(self) -> bool:
        """Not wholly: a local context that was moved to the memory does not come back."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.seen_BL = None if self.seen_BL is None else self.seen_BL[indices]
        if self._lead_B1 is not None and self._lead_B1.shape[0] > 1:
            self._lead_B1 = self._lead_B1[indices]
        self.memory.select(indices)
        self._tail.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (rows := self.rows) is not None:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FotCache":
        """What it holds, without the graph of the passes that made it."""
        made = copy.copy(self)
        memo[id(self)] = made
        for name, value in vars(self).items():
            setattr(made, name, copy.deepcopy(value, memo) if name != "layers" else [])
        for layer in self.layers:
            made.layers.append(copy.copy(layer))
            if layer.is_initialized:
                made.layers[-1].keys = layer.keys.detach().clone()
                made.layers[-1].values = layer.values.detach().clone()
        return made

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Write everything to a safetensors file, which says what model it belongs to. With sharded models all ranks
        call it; under tensor parallelism the first writes the heads of all."""
        tensors = {f"memory.{key}": tensor for key, tensor in self.memory.state_dict().items()}
        for number, layer in enumerate(self.layers):
            if layer.is_initialized:
                tensors |= {f"local.{number}.keys": layer.keys, f"local.{number}.values": layer.values}
        if self.seen_BL is not None:
            tensors["seen"] = self.seen_BL
        if self._lead_B1 is not None:
            tensors["lead"] = self._lead_B1
        if len(self._tail):
            tensors["tail.embeddings"], tensors["tail.seen"] = self._tail.inputs()
        cache_file.write(path, model, tensors, self._left)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, memory: Memory | None = None) -> "FotCache":
        """Read what `save` wrote, onto the model's device; `memory` takes the memory's part (by default a
        `DenseMemory`). Raises ValueError for a file of another model or of another kind, and for a damaged one: what a
        file holds is told by its digest, and must fit together."""
        cache = cls(model.config, memory)
        tensors, cache._left = cache_file.read(path, model)
        cache.memory.load_state_dict(
            {key.removeprefix("memory."): tensor for key, tensor in tensors.items() if key.startswith("memory.")}
        )
        for number, layer in enumerate(cache.layers):
            if f"local.{number}.keys" in tensors:
                layer.update(*(tensors[f"local.{number}.{name}"].to(model.dtype) for name in ("keys", "values")))
        cache.seen_BL, cache._lead_B1 = tensors.get("seen"), tensors.get("lead")
        if "tail.embeddings" in tensors:
            cache.note(tensors["tail.embeddings"].to(model.dtype), tensors["tail.seen"])
        cache._positions_used = cache.local_length
        return cache

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """What is read inside is not there where it fails: the cache is as it was before. Costs nothing but, where
        something leaves the local context, that this is held a second time until the end."""
        names = ("seen_BL", "angles", "_lead_B1", "_left", "_positions_used", "_tail")
        before, tail = {name: getattr(self, name) for name in names}, len(self._tail)
        self._undo = undo = Undo(self.local_length)
        try:
            yield
        except BaseException:
            self._keep_local()
            for layer, (keys, values) in zip(self.layers, undo.local or [], strict=True):
                layer.reset()
                if undo.length:
                    layer.lazy_initialization(keys, values)
                    layer.keys, layer.values = keys, values
            if len(self.memory):
                self.memory.truncate(min(undo.remembered, before["_left"]) if undo.memory else before["_left"])
            for number, (keys, values, seen_BL) in undo.memory.items():
                self.memory.append(number, keys, values, seen_BL)
            for name, value in before.items():
                setattr(self, name, value)
            self._tail = self._tail.before(tail)
            raise
        finally:
            self._undo = None

    def _keep_local(self) -> None:
        """Hold what `undone_on_failure` is to bring back, before it changes in place of being appended to."""
        if self._undo is not None and self._undo.local is None:
            length = self._undo.length
            self._undo.local = [
                (layer.keys[:, :, :length], layer.values[:, :, :length]) if length else (None, None)
                for layer in self.layers
            ]

    def _turns(self, number: int) -> bool:
        """Whether the layer has positions."""
        return self._turns_memory_layers or number not in self._mem_layers

    def _turn_back(self, by: tuple[Tensor, Tensor]) -> None:
        """Turn all keys of the local context."""
        for number, layer in enumerate(self.layers):
            if self._turns(number):
                layer.keys = turn_back(layer.keys, *by)

    def _known(self, like_BP: Tensor) -> Tensor | None:
        """What of all tokens read is no padding, as far as it is known; None where nothing is."""
        held = [tensor for name, tensor in self.memory.state_dict().items() if name.endswith(".seen")]
        if not held and self.seen_BL is None:
            return None
        known_BP = torch.ones_like(like_BP)
        if held:
            known_BP[:, : self._left] = held[0][:, 0, :, 0].to(known_BP.device)
        if self.seen_BL is not None:
            known_BP[:, self._left :] = self.seen_BL.to(known_BP.device)
        return known_BP

    def _positions(self, length: int, device: torch.device) -> Tensor:
        """Positions [B or 1, length] of the local context's first tokens, padding not counted."""
        if self.seen_BL is None:
            return torch.arange(length, device=device)[None]
        return (self.seen_BL[:, :length].long().cumsum(1) - 1).clamp(min=0)


@dataclass
class Undo:
    """What a failure is to bring back: the first `length` tokens of the local context [(keys, values) a layer], and
    what was taken from the memory: the tokens after `remembered`, by layer."""

    length: int
    local: list[Any] | None = None
    remembered: int = 0
    memory: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    def keep_memory(self, memory: Memory, length: int) -> None:
        """Copy what is about to be forgotten, and written over."""
        held = {name: tensor[:, :, length:].clone() for name, tensor in memory.state_dict().items()}
        self.remembered = length
        for name, keys in held.items():
            if name.endswith(".keys"):
                number = name.removesuffix(".keys")
                seen = held.get(f"{number}.seen")
                self.memory[int(number)] = (
                    keys, held[f"{number}.values"], None if seen is None else seen[:, 0, :, 0],
                )  # fmt: skip


class Tail:
    """The last tokens' inputs [B, L, C], and which are no padding [B, L]."""

    def __init__(self) -> None:
        self._embeddings, self._seen = GrowingBuffer(), GrowingBuffer()

    def __len__(self) -> int:
        return self._embeddings.length

    def append(self, embeddings_BLC: Tensor, seen_BL: Tensor | None) -> None:
        if seen_BL is None:
            seen_BL = torch.ones(embeddings_BLC.shape[:2], dtype=torch.bool, device=embeddings_BLC.device)
        self._embeddings.append(embeddings_BLC[:, None])
        self._seen.append(seen_BL[:, None, :, None])

    def inputs(self, end: int | None = None) -> tuple[Tensor, Tensor]:
        return self._embeddings.view(0, end)[:, 0], self._seen.view(0, end)[:, 0, :, 0]

    def before(self, end: int) -> "Tail":
        first = Tail()
        if len(self) and end > 0:
            first.append(*self.inputs(end))
        return first

    def select(self, rows: Tensor) -> None:
        self._embeddings.select(rows)
        self._seen.select(rows)

    def hide(self, seen_BL: Tensor) -> None:
        if len(self):
            self._seen = GrowingBuffer()
            self._seen.append(seen_BL[:, None, :, None])
