"""Configuration: a LLaMA's, and which of its layers are memory layers."""

from typing import Any

from transformers import LlamaConfig

LLAMA_MODEL_TYPES = ("llama", "fot_llama")


def default_mem_layers(num_hidden_layers: int) -> list[int]:
    """Memory layers for a LLaMA of this depth, after the paper's choices.

    Deep models get three at the quarters (LongLLaMA 3B, 26 layers: 6, 12, 18; 7B, 32 layers: 8, 16, 24), small ones
    a single layer at two thirds (12 layers: 8).
    """
    if num_hidden_layers >= 24:
        quarter = num_hidden_layers // 4
        return [quarter, 2 * quarter, 3 * quarter]
    return [2 * num_hidden_layers // 3]


class FotLlamaConfig(LlamaConfig):
    """A LLaMA configuration with memory layers.

    `mem_layers`: indices of the layers that see additional contexts in training and the memory at inference; empty
    makes an ordinary LLaMA. `mem_positionals`: whether memory layers keep RoPE (LongLLaMA) or use no positions at
    all (the paper's small models). `local_context`: tokens of the windows it was fine-tuned with, to be read with.
    Loads from any LLaMA checkpoint's configuration.

    Raises ValueError for a checkpoint that is no LLaMA.
    """

    model_type = "fot_llama"

    mem_layers: list[int] | None = None
    mem_positionals: bool = True
    local_context: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mem_layers = sorted(set(self.mem_layers or []))
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(*args, **kwargs)
        model_type = config.get("model_type")
        if config and model_type not in LLAMA_MODEL_TYPES:
            raise ValueError(f"the checkpoint is no LLaMA: its config.json says model_type {model_type!r}")
        # Same architecture under another name: without this transformers warns of a type mismatch.
        return {**config, "model_type": cls.model_type}, kwargs
