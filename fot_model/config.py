"""Configuration: a LLaMA's, and which of its layers are memory layers."""

from typing import Any

import torch
from transformers import LlamaConfig

LLAMA_MODEL_TYPES = ("llama", "fot_llama", "longllama")
MEMORY_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_mem_layers(num_hidden_layers: int) -> list[int]:
    """Memory layers for a LLaMA of this depth, after the paper's choices.

    Deep models get three at the quarters (LongLLaMA 3B, 26 layers: 6, 12, 18; 7B, 32 layers: 8, 16, 24), small ones
    a single layer at two thirds (12 layers: 8).
    """
    if num_hidden_layers >= 24:
        quarter = num_hidden_layers // 4
        return [quarter, 2 * quarter, 3 * quarter]
    return [2 * num_hidden_layers // 3]


def in_order(mem_layers: Any) -> list[int]:
    """Layer numbers in order and once. Raises ValueError for anything but a list of whole numbers."""
    if not isinstance(mem_layers, list | tuple | None) or any(type(layer) is not int for layer in mem_layers or []):
        raise ValueError(f"mem_layers {mem_layers!r}: give a list of layer numbers, such as [6, 12, 18]")
    return sorted(set(mem_layers or []))


class FotLlamaConfig(LlamaConfig):
    """A LLaMA configuration with memory layers. Loads from any LLaMA or LongLLaMA checkpoint's configuration.

    - `mem_layers`: indices of the layers that see additional contexts in training and the memory at inference; empty
      makes an ordinary LLaMA.
    - `mem_positionals`: whether memory layers keep RoPE (LongLLaMA) or use no positions at all (the paper's small
      models).
    - `mem_dtype`: number type of keys and values in memory ("float32", "bfloat16", "float16"); None is the model's.
    - `mem_gate`: memory joins through a learnt gate a head, as in the Memorizing Transformer; adds parameters.
    - `mem_qk_norm`: memory layers score by cosine times a learnt temperature a head instead of by inner product over
      sqrt(D); adds parameters.
    - `previous_context`: it was trained as a Transformer-XL, every layer seeing the context before. Reading does not do
      so; a plan with `objective="transformer_xl"` does.
    - `local_context`: tokens of the local context (the window); None is `max_position_embeddings`. With
      longrope and dynamic RoPE choose at most the original length: beyond it transformers' frequencies change with
      the length of a call, and so does what was read.
    - `last_context_length`: tokens that stay local when a long input goes to memory. None, the default, makes windows
      that do not depend on how an input was split into calls; a number follows LongLLaMA's code: of each longer input
      all but that many last tokens go to memory, window by window.

    Raises ValueError for a checkpoint that is no LLaMA, and for values out of range.
    """

    model_type = "fot_llama"

    mem_layers: list[int] | None = None
    mem_positionals: bool = True
    mem_dtype: str | None = None
    mem_gate: bool = False
    mem_qk_norm: bool = False
    previous_context: bool = False
    local_context: int | None = None
    last_context_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mem_layers = in_order(self.mem_layers)
        super().__post_init__(**kwargs)

    @property
    def window(self) -> int:
        """Tokens of the local context."""
        return self.max_position_embeddings if self.local_context is None else self.local_context

    @property
    def memory_dtype(self) -> torch.dtype | None:
        """`mem_dtype` as torch names it."""
        return None if self.mem_dtype is None else MEMORY_DTYPES[self.mem_dtype]

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        layers, window = self.num_hidden_layers, self.local_context
        self.mem_layers = in_order(self.mem_layers)  # from_pretrained sets it as given
        if bad := [layer for layer in self.mem_layers if not 0 <= layer < layers]:
            raise ValueError(f"mem_layers {bad} out of range: the model has {layers} layers, 0 to {layers - 1}")
        if self.mem_dtype not in (None, *MEMORY_DTYPES):
            raise ValueError(f"mem_dtype {self.mem_dtype!r}: give one of {', '.join(MEMORY_DTYPES)}")
        if window is not None and (not isinstance(window, int) or window < 2):
            raise ValueError(f"local_context {window!r}: give the tokens of a window, 2 or more")
        self.check_last_context(self.last_context_length)

    def check_last_context(self, length: int | None) -> None:
        """Raises ValueError for a `last_context_length` that the window cannot hold."""
        if length is not None and not (type(length) is int and 1 <= length <= self.window):
            raise ValueError(f"last_context_length {length!r}: the local context holds 1 to {self.window} tokens")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(*args, **kwargs)
        model_type = config.get("model_type")
        if config and model_type not in LLAMA_MODEL_TYPES:
            raise ValueError(f"the checkpoint is no LLaMA: its config.json says model_type {model_type!r}")
        if model_type == LongLlamaConfig.model_type:
            defaults = {name: getattr(LongLlamaConfig, name) for name in LONGLLAMA_DEFAULTS}
            config = {**defaults, **{key: value for key, value in config.items() if key not in LONGLLAMA_CODE}}
        # Same architecture under another name: without this transformers warns of a type mismatch.
        return {**config, "model_type": cls.model_type}, kwargs


# Where a released configuration's defaults are others than ours, what it leaves out, and what in it belongs to its own
# code.
LONGLLAMA_DEFAULTS = ("mem_dtype", "last_context_length", "mem_attention_grouping", "pad_token_id")
UNSAID = (
    "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "mem_gate", "mem_qk_norm", "previous_context",
    "local_context",
)  # fmt: skip
LONGLLAMA_CODE = ("auto_map", "architectures", "torch_attention", "gradient_checkpoint_every_ith")


class LongLlamaConfig(FotLlamaConfig):
    """The configuration of a released LongLLaMA checkpoint, read as FoT's and written in the released layout."""

    model_type = "longllama"

    mem_dtype: str | None = "bfloat16"
    last_context_length: int | None = 1024
    mem_attention_grouping: list[int] | None = None
    pad_token_id: int | None = 0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict({k: v for k, v in config_dict.items() if k not in LONGLLAMA_CODE}, **kwargs)

    @classmethod
    def of(cls, config: FotLlamaConfig) -> "LongLlamaConfig":
        """The same model in the released layout. Raises ValueError for what that layout cannot say."""
        made = cls(**{**config.to_dict(), "model_type": cls.model_type, "architectures": ["LongLlamaForCausalLM"]})
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError for a value out of range, or one that the released layout cannot say."""
        said = {
            "num_key_value_heads": (self.num_key_value_heads, self.num_attention_heads),
            "head_dim": (self.head_dim, self.hidden_size // self.num_attention_heads),
            "attention_bias": (self.attention_bias, False),
            "mlp_bias": (self.mlp_bias, False),
            "rope_type": (self.rope_parameters["rope_type"], "default"),
            "mem_gate": (self.mem_gate, False),
            "previous_context": (self.previous_context, False),
            "mem_qk_norm": (self.mem_qk_norm, False),
        }
        for name, (value, only) in said.items():
            if value != only:
                raise ValueError(f"the longllama layout has no {name} {value!r} (only {only!r}): save it as fot_llama")
        if self.last_context_length is None:
            raise ValueError(
                f"the longllama layout has no last_context_length None, windows that keep half: set a number "
                f"({max(1, self.window // 2)}, say), with which it reads here as there, or save it as fot_llama"
            )
        super().check()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        rope = values.pop("rope_parameters", None) or {}
        for name in UNSAID:
            values.pop(name, None)
        return {
            **values,
            "max_position_embeddings": self.window,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "mem_dtype": self.mem_dtype or str(self.dtype or torch.float32).removeprefix("torch."),
            "last_context_length": self.last_context_length,
        }
