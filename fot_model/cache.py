"""`FotCache`: what a FoT model has read, as transformers' `past_key_values`.

It holds the local context (keys and values of every layer, positions 0 to W - 1) and the memory (keys and values of the
memory layers, for everything before). Tokens enter at the end of the local context and leave at its start, block by
block, into the memory: memory layers hand theirs over turned back to position 0, the other layers forget theirs, and
what stays moves down to the first positions.

Shapes: B batch, Hk key/value heads, L tokens, D head size.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model.config import FotLlamaConfig
from fot_model.memory import DenseMemory, GrowingBuffer, Memory
from fot_model.rope import rotation, turn_back

FORMAT = "fot-cache-1"
# What, beside the parameters, decides on keys and values.
SHAPE = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters",
    "mem_layers", "mem_positionals", "mem_gate", "mem_qk_norm",
)  # fmt: skip


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
        self._mem_layers = frozenset(config.mem_layers or [])
        self._turns_memory_layers = config.mem_positionals
        self._rope = LlamaRotaryEmbedding(config)
        self._left = len(self.memory)  # tokens that left the local context
        self._reach = 0  # positions used while the local context's keys were rotated
        self._tail = Tail()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """All tokens read."""
        return self._left + self.local_length

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
        [B or 1, length]: in the local context, padding not counted."""
        start = self.local_length
        self._reach = max(self._reach if start else 0, start + length)
        if seen_BL is not None or self.seen_BL is not None:
            all_seen = torch.ones(rows, start + length, dtype=torch.bool, device=device)
            past = all_seen[:, :start] if self.seen_BL is None else self.seen_BL
            self.seen_BL = torch.cat([past, all_seen[:, start:] if seen_BL is None else seen_BL], dim=1)
        return self._positions(start + length, device)[:, start:]

    def evict(self, count: int) -> None:
        """Move the first `count` tokens of the local context to the memory."""
        length = self.local_length
        assert 0 <= count <= length, (count, length)
        if count == 0:
            return
        device = self.layers[0].keys.device
        positions = self._positions(length, device)
        gone_BL = None if self.seen_BL is None else self.seen_BL[:, :count]
        moved_B1 = positions.new_full((1, 1), count) if gone_BL is None else gone_BL.sum(1, keepdim=True)
        back_to_start = rotation(self._rope, positions[:, :count], self._reach)
        back_by_moved = rotation(self._rope, moved_B1, self._reach)
        for number, layer in enumerate(self.layers):
            remembers = number in self._mem_layers
            turns = self._turns_memory_layers or not remembers
            keys, values = layer.keys, layer.values
            if remembers:
                gone = keys[:, :, :count]
                gone = turn_back(gone, *back_to_start) if turns else gone
                self.memory.append(number, gone, values[:, :, :count], gone_BL)
            if count == length:
                layer.reset()
            else:
                kept = keys[:, :, count:]
                layer.keys = turn_back(kept, *back_by_moved) if turns else kept.clone()
                layer.values = values[:, :, count:].clone()
        if self.seen_BL is not None:
            stays_BL = self.seen_BL[:, count:]
            self.seen_BL = None if stays_BL.all() else stays_BL
        self._left += count

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
        self._tail = self._tail.before(len(self._tail) - (self.get_seq_length() - length))
        if length > self._left:
            super().crop(length - self.get_seq_length())
            self.seen_BL = None if self.seen_BL is None else self.seen_BL[:, : self.local_length]
            return
        super().reset()
        self.seen_BL = None
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
        """Write everything to a safetensors file, which says what model it belongs to."""
        tensors = {f"memory.{key}": tensor for key, tensor in self.memory.state_dict().items()}
        for number, layer in enumerate(self.layers):
            if layer.is_initialized:
                tensors |= {f"local.{number}.keys": layer.keys, f"local.{number}.values": layer.values}
        if self.seen_BL is not None:
            tensors["seen"] = self.seen_BL
        if len(self._tail):
            tensors["tail.embeddings"], tensors["tail.seen"] = self._tail.inputs()
        metadata = {"format": FORMAT, "model": fingerprint(model), "left": json.dumps(self._left)}
        unfinished = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished, metadata)
            unfinished.chmod(mode)  # safetensors lets no one else read it
            os.replace(unfinished, path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, memory: Memory | None = None) -> "FotCache":
        """Read what `save` wrote, onto the model's device; `memory` takes the memory's part (by default a
        `DenseMemory`). Raises ValueError for a file of another model or of another kind."""
        cache = cls(model.config, memory)
        if not os.path.isfile(path):
            raise ValueError(f"{path} is no memory file: there is no such file")
        try:
            with safe_open(os.fspath(path), framework="pt", device=str(model.device)) as file:
                metadata = file.metadata() or {}
                check_origin(path, metadata, model)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no memory file, or damaged ({error}): save it again") from None
        cache.memory.load_state_dict(
            {key.removeprefix("memory."): tensor for key, tensor in tensors.items() if key.startswith("memory.")}
        )
        for number, layer in enumerate(cache.layers):
            if f"local.{number}.keys" in tensors:
                layer.update(*(tensors[f"local.{number}.{name}"].to(model.dtype) for name in ("keys", "values")))
        cache.seen_BL = tensors.get("seen")
        if "tail.embeddings" in tensors:
            cache.note(tensors["tail.embeddings"].to(model.dtype), tensors["tail.seen"])
        cache._left, cache._reach = json.loads(metadata["left"]), cache.local_length
        return cache

    def _positions(self, length: int, device: torch.device) -> Tensor:
        """Positions [B or 1, length] of the local context's first tokens, padding not counted."""
        if self.seen_BL is None:
            return torch.arange(length, device=device)[None]
        return (self.seen_BL[:, :length].long().cumsum(1) - 1).clamp(min=0)


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


def check_origin(path: str | os.PathLike[str], metadata: Mapping[str, str], model: PreTrainedModel) -> None:
    """Raises ValueError for a file of another kind, or of another model."""
    if metadata.get("format") != FORMAT or "model" not in metadata:
        raise ValueError(f"{path} is no memory file: FotCache.save writes one")
    if (theirs := metadata["model"]) != (ours := fingerprint(model)):
        raise ValueError(
            f"{path} is the memory of another model (fingerprint {theirs[:12]}, this model's is {ours[:12]}): load "
            f"that model, or read the text again with this one"
        )


def fingerprint(model: PreTrainedModel) -> str:
    """Names a model by its shape and a sample of every parameter, in bfloat16 so that it does not matter
    whether it was loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    config = model.config
    shape = {name: getattr(config, name) for name in SHAPE}
    if not shape["mem_qk_norm"]:
        del shape["mem_qk_norm"]  # so that files saved before there was such a thing are still read
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
