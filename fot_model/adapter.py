"""An adapter: what a training changed of a model, kept apart from the base that it began with.

A directory with `adapter.safetensors` (the tensors) and `adapter.json` (what they belong to). Tensors are whole
parameters under their names in the model, or pairs `NAME.lora_A.weight` [r, in] and `NAME.lora_B.weight` [out, r] that
add (alpha / r) B A to `NAME.weight` (LoRA, arXiv 2106.09685, section 4.1).

An adapter goes with one base alone, known by its fingerprint: a digest of the weights as they are loaded, in float32,
and of what the configuration says about computing with them. Neither where the files lie nor how they are laid out
changes it, nor a number type that holds the same values.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fot_model.config import FotLlamaConfig

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
FORMAT = 1
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
CHUNK = 1 << 22  # numbers that are made float32 at once
# What a training may set of a configuration, and what decides the numbers that come of the same weights.
SETTINGS = ("mem_layers", "mem_positionals", "mem_gate", "previous_context", "local_context", "last_context_length")
DECIDING = ("hidden_act", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")


@dataclass(frozen=True)
class Lora:
    """LoRA's settings: `targets` are the last names of the modules that have a pair (q_proj)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """`base`: its fingerprint; `settings`: those of the configuration it was trained with; `lora`: None where all
    tensors are whole parameters; `training`: facts for people (JSON)."""

    base: str
    settings: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    lora: Lora | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Raises ValueError for a directory that holds no whole adapter."""
        path = Path(directory)
        if missing := [name for name in (DESCRIPTION, WEIGHTS) if not (path / name).is_file()]:
            raise ValueError(f"{path} is no adapter: it has no {missing[0]}")
        try:
            found = json.loads((path / DESCRIPTION).read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"adapter {path} has format {found['format']}, this version reads {FORMAT}")
            tensors = load_file(path / WEIGHTS)
            lora = found["lora"] and Lora(**{**found["lora"], "targets": tuple(found["lora"]["targets"])})
            if sorted(tensors) != found["trained"]:
                raise ValueError(f"adapter {path} is damaged: {WEIGHTS} holds other tensors than {DESCRIPTION} says")
            if unknown := set(found["settings"]) - set(SETTINGS):
                raise ValueError(f"adapter {path} sets {sorted(unknown)[0]}, which is no adapter's to set")
            return cls(found["base"], found["settings"], found["training"], lora, tensors)
        except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"adapter {path} is damaged ({type(error).__name__}: {error})") from None

    def save(self, directory: str | Path) -> None:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION).write_text(self.description())
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path / WEIGHTS)
        (path / WEIGHTS).chmod((path / DESCRIPTION).stat().st_mode & 0o777)  # safetensors lets no one else read it

    def description(self) -> str:
        """What `adapter.json` holds."""
        lora = None if self.lora is None else vars(self.lora)
        said = {"format": FORMAT, "base": self.base, "settings": self.settings, "training": self.training}
        return json.dumps({**said, "lora": lora, "trained": sorted(self.tensors)}, indent=1)

    def to(self, dtype: torch.dtype) -> Self:
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def pairs(self) -> list[str]:
        """The modules with a pair."""
        return [name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)]

    def without_pairs(self) -> Self:
        return replace(self, lora=None, tensors={name: self.tensors[name] for name in self.whole_names(merged=False)})

    def whole_names(self, merged: bool) -> list[str]:
        """The parameters that are there whole; `merged`: and those that pairs change."""
        whole = [name for name in self.tensors if not name.endswith((LORA_A, LORA_B))]
        return [*whole, *(f"{module}.weight" for module in self.pairs if merged)]

    def check_base(self, found: str, base: object) -> None:
        """Raises ValueError where `found` is not the fingerprint of the base it was trained from."""
        if found != self.base:
            raise ValueError(
                f"the adapter was trained from another base than {base}: its base's fingerprint is {self.base}, this "
                f"one's is {found}"
            )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put the tensors into their base, in the base's number types. Raises ValueError for one that has no place."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.tensors.items():
            if name.endswith(LORA_B):
                continue
            target = name.removesuffix(LORA_A) + ".weight" if name.endswith(LORA_A) else name
            if target not in parameters:
                raise ValueError(f"the adapter holds {name}, the model has no {target}")
            weight = parameters[target]
            if name.endswith(LORA_A):
                assert self.lora is not None, "only LoRA has pairs"
                a, b = tensor.float(), self.tensors[target.removesuffix(".weight") + LORA_B].float()
                weight.copy_(weight.float() + (b @ a).to(weight.device) * (self.lora.alpha / self.lora.rank))
            else:
                weight.copy_(tensor)


def settings_of(config: FotLlamaConfig) -> dict[str, Any]:
    """What of a configuration goes with an adapter."""
    return {name: getattr(config, name) for name in SETTINGS}


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """The fingerprint of a model as loaded. `without`: parameters that its files did not bring."""
    weights = {name: parameter for name, parameter in model.named_parameters() if name not in without}
    config = {name: _rounded(getattr(model.config, name)) for name in DECIDING}
    return _hash([config, tensors_digest(weights)])


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and, in float32, values."""
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    return _hash([[name, list(tensors[name].shape), digest] for name, digest in zip(names, digests, strict=True)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _digest(parameter: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for chunk in parameter.detach().flatten().split(CHUNK):
        digest.update(chunk.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _rounded(value: Any) -> Any:
    """Numbers as float32 tells them apart: a file's 1e-5 may be 9.99999975e-06."""
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else value
