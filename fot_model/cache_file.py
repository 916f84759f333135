"""A memory file: what a `FotCache` holds, as safetensors with metadata that say whose it is and what is in it.

It belongs to one model, known by a fingerprint of samples, and to the bit to one content, known by its digest. Nothing
of it is believed: shapes and number types are held against the model's configuration before anything is read on.

Shapes: B batch, Hk key/value heads, L tokens, D head size.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from fot_model.config import FotLlamaConfig

FORMAT = "fot-cache-2"
FORMATS = ("fot-cache-1", FORMAT)  # the first had no digest
# What, beside the parameters, decides on keys and values.
DECIDING = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters",
    "mem_layers", "mem_positionals", "mem_gate", "mem_qk_norm",
)  # fmt: skip


def write(path: str | os.PathLike[str], model: PreTrainedModel, tensors: Mapping[str, Tensor], left: int) -> None:
    """`left`: tokens that left the local context. Raises OSError where the file cannot be written; what lay there
    stays then."""
    metadata = {"format": FORMAT, "model": sampled_fingerprint(model), "left": json.dumps(left)}
    heads = HeadShards(model)
    whole = {key: heads.gathered(key, tensor).contiguous() for key, tensor in tensors.items()}
    try:
        if heads.rank == 0:
            _write(path, whole, {**metadata, "digest": contents_digest(metadata, whole)})
    finally:
        heads.wait()


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = Path(f"{os.fspath(path)}.{secrets.token_hex(8)}.tmp")
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)  # safetensors lets no one else read it
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], model: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """What `write` wrote, on the model's device. Raises ValueError for a file of another model or of another kind, and
    for a damaged one."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no memory file: there is no such file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            check_origin(path, metadata, model)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no memory file, or damaged ({error}): save it again") from None
    if metadata["format"] == FORMAT and metadata.get("digest") != contents_digest(metadata, tensors):
        raise ValueError(f"{path} is a damaged memory file (what it holds has another digest): save it again")
    left = metadata.get("left", "")
    wrong = find_wrong(tensors, int(left), model.config) if left.isdigit() else f"left is {left!r}"
    if wrong is not None:
        raise ValueError(f"{path} is a damaged memory file ({wrong}): save it again")
    heads = HeadShards(model)
    device: Any = model.device
    if device.type == "meta":  # offloaded by accelerate
        device = getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu"
    return {key: heads.own(key, tensor).to(device) for key, tensor in tensors.items()}, int(left)


def check_origin(path: str | os.PathLike[str], metadata: Mapping[str, str], model: PreTrainedModel) -> None:
    """Raises ValueError for a file of another kind, or of another model."""
    if metadata.get("format") not in FORMATS or "model" not in metadata:
        raise ValueError(f"{path} is no memory file: FotCache.save writes one")
    if (theirs := metadata["model"]) != (ours := sampled_fingerprint(model)):
        raise ValueError(
            f"{path} is the memory of another model (fingerprint {theirs[:12]}, this model's is {ours[:12]}): load "
            f"that model, or read the text again with this one"
        )


def find_wrong(tensors: Mapping[str, Tensor], left: int, config: FotLlamaConfig) -> str | None:
    """What of these no cache of such a model holds after `left` tokens left its local context; None if all fits."""
    expected, optional = expected_shapes(tensors, left, config)
    if missing := sorted(set(expected) - set(tensors)):
        return f"it has no {missing[0]}"
    for key, tensor in tensors.items():
        shapes = [expected[key]] if key in expected else optional.get(key, [])
        if key == "lead":
            typed = tensor.dtype == torch.long
        else:
            typed = tensor.dtype == torch.bool if key.endswith("seen") else tensor.is_floating_point()
        if tuple(tensor.shape) not in shapes or not typed or not len(tensor):
            return f"{key} is {tensor.dtype} {list(tensor.shape)}"
    return None


def expected_shapes(
    tensors: Mapping[str, Tensor], left: int, config: FotLlamaConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[tuple[int, ...]]]]:
    """What must be there, and what may be; rows and tokens of the local context are as the tensors have them."""
    rows = max((len(tensor) for key, tensor in tensors.items() if key.endswith(".keys")), default=0)
    first, tail = tensors.get("local.0.keys"), tensors.get("tail.seen")
    local = first.shape[2] if first is not None and first.dim() == 4 else 0
    replayed = min(tail.shape[-1], left + local) if tail is not None else 0
    Hk, D = config.num_key_value_heads, config.head_dim
    expected: dict[str, tuple[int, ...]] = {}
    mem_layers = (config.mem_layers or []) if left else []
    for where, layers, length in (
        ("memory", mem_layers, left),
        ("local", range(config.num_hidden_layers if local else 0), local),
    ):
        expected |= {f"{where}.{n}.{name}": (rows, Hk, length, D) for n in layers for name in ("keys", "values")}
    padding = dict.fromkeys([f"memory.{n}.seen" for n in mem_layers], (rows, 1, left, 1))
    if padding.keys() & tensors.keys():  # all or none
        expected |= padding
    if tail is not None:
        expected |= {"tail.embeddings": (rows, replayed, config.hidden_size), "tail.seen": (rows, replayed)}
    return expected, {"seen": [(rows, local)], "lead": [(1, 1), (rows, 1)]}


def contents_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of what a memory file says and holds, to the bit."""
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    said = [metadata.get(name) for name in ("format", "model", "left")]
    held = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    return hashlib.sha256(json.dumps([said, held, digests]).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=32)
    digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sampled_fingerprint(model: PreTrainedModel) -> str:
    """Names a model by its settings and a sample of every parameter, in bfloat16 so that it does not matter whether it
    was loaded in float32 or bfloat16 (`adapter.fingerprint` takes every bit). Where its parameters are sharded, all
    ranks call it."""
    digest = hashlib.sha256()
    config = model.config
    settings = {name: getattr(config, name) for name in DECIDING}
    if not settings["mem_qk_norm"]:
        del settings["mem_qk_norm"]  # so that files saved before there was such a thing are still read
    digest.update(json.dumps(settings, sort_keys=True).encode())
    sampled = {name: (shape, sample) for name, shape, sample in samples(model)}
    for name, (size, sample) in sorted(sampled.items()):
        digest.update(f"{name}{size}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def samples(model: nn.Module) -> Iterator[tuple[str, list[int], Tensor]]:
    """(name, shape, some numbers in bfloat16) of each parameter as the LLaMA computes with it: wrappers do not count
    (torch.compile, DDP, PEFT), adapters of PEFT do as far as they are switched on, merged or not."""
    for name, parameter in _parameters(llama_of(model), "", {}):
        flat = parameter.flatten()
        yield name, list(parameter.shape), flat[:: max(1, flat.numel() // 64)].to("cpu", torch.bfloat16).contiguous()


def llama_of(model: nn.Module) -> nn.Module:
    """The model inside its wrappers."""
    return next((module for module in model.modules() if isinstance(module, LlamaForCausalLM)), model)


def _parameters(module: nn.Module, prefix: str, known: dict[int, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Those not `known` yet by their id: tied ones count once."""
    own = {name: each for name, each in module.named_parameters(recurse=False) if id(each) not in known}
    known |= {id(each): each for each in own.values()}
    with _brought(module):
        for name in own:
            yield prefix + name, _whole(getattr(module, name))
    children: Iterator[tuple[str, Any]] = module.named_children()
    for name, child in children:
        if hasattr(child, "base_layer") and hasattr(child, "get_delta_weight"):  # a layer of LoRA or its like
            for each, parameter in _parameters(child.base_layer, f"{prefix}{name}.", known):
                yield each, _adapted(child, parameter) if each == f"{prefix}{name}.weight" else parameter
        elif hasattr(child, "original_module") and hasattr(child, "modules_to_save"):
            on = [] if child.disable_adapters else child.active_adapters
            counts = [child.modules_to_save[each] for each in on if each in child.modules_to_save]
            yield from _parameters((counts or [child.original_module])[0], f"{prefix}{name}.", known)
        else:
            yield from _parameters(child, f"{prefix}{name}.", known)


def _brought(module: nn.Module) -> Any:
    """A context in which the module's own parameters are there, also where accelerate keeps them elsewhere or ZeRO-3
    has partitioned them."""
    own = list(module.parameters(recurse=False))
    if any(hasattr(parameter, "ds_id") for parameter in own):
        return _gathered(own)
    if not any(parameter.is_meta for parameter in own):
        return nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]  # what offloaded it is installed

    return align_module_device(module)


@contextmanager
def _gathered(partitioned: list[Any]) -> Iterator[None]:
    """By the methods that DeepSpeed gives its parameters."""
    partitioned[0].all_gather(param_list=partitioned)
    try:
        yield
    finally:
        partitioned[0].partition(param_list=partitioned, has_been_updated=False)


def _whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "full_tensor"):  # a DTensor
        parameter = parameter.full_tensor()
    if type(parameter) not in (Tensor, nn.Parameter) and hasattr(type(parameter), "__torch_dispatch__"):
        parameter = parameter.dequantize()  # a kind of tensor that torchao makes
    return parameter.detach()


def _adapted(layer: Any, weight: Tensor) -> Tensor:
    """The base layer's weight with the adapters that are on, as merging adds them, and without those that are off."""
    on, merged = [] if layer.disable_adapters else layer.active_adapters, layer.merged_adapters
    for adapter in (each for each in on if each not in merged and each in layer.scaling):
        weight = weight + layer.get_delta_weight(adapter).to(weight)
    for adapter in (each for each in merged if each not in on):
        weight = weight - layer.get_delta_weight(adapter).to(weight)
    return weight


class HeadShards:
    """How key/value heads are spread over the ranks of tensor parallelism; not at all without it."""

    def __init__(self, model: PreTrainedModel) -> None:
        weight: Any = llama_of(model).get_submodule("model.layers.0.self_attn.k_proj").weight
        self._group: Any = None
        if hasattr(weight, "device_mesh") and (getattr(model, "tp_size", None) or 1) > 1:
            self._group = weight.device_mesh.get_group(weight.device_mesh.ndim - 1)
        self.rank: int = 0 if self._group is None else self._group.rank()
        self._size: int = 1 if self._group is None else self._group.size()

    def gathered(self, key: str, tensor: Tensor) -> Tensor:
        """The heads of all ranks [B, Hk, L, D]."""
        if self._group is None or not key.endswith((".keys", ".values")):
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self._size)]
        distributed.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)

    def own(self, key: str, tensor: Tensor) -> Tensor:
        """Those of this rank."""
        return tensor.chunk(self._size, dim=1)[self.rank] if key.endswith((".keys", ".values")) else tensor

    def wait(self) -> None:
        """Until the first rank has written."""
        if self._group is not None:
            distributed.barrier(group=self._group)
