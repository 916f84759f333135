"""A LLaMA's sizes, and its parameters by name: formulas only, no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes, in Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json, or whatever else has its keys. Missing ones are as transformers takes them."""
        heads = config.get("num_attention_heads", 32)
        return cls(
            config["vocab_size"],
            config["hidden_size"],
            config.get("intermediate_size", 11008),
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            *(bool(config.get(name)) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
        )

    @property
    def queries(self) -> int:
        """Hq D: width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Hk D: width of all key (or value) heads."""
        return self.num_key_value_heads * self.head_dim


def parameter_sizes(shape: Shape, gated: Collection[int] = ()) -> dict[str, int]:
    """Numbers of every parameter, by its name in the model. `gated`: layers with the Memorizing Transformer's gate."""
    C, inner = shape.hidden_size, shape.intermediate_size
    sizes = {"model.embed_tokens.weight": shape.vocab_size * C}
    for layer in range(shape.num_hidden_layers):
        matrices = {
            "self_attn.q_proj": (C, shape.queries, shape.attention_bias),
            "self_attn.k_proj": (C, shape.keys, shape.attention_bias),
            "self_attn.v_proj": (C, shape.keys, shape.attention_bias),
            "self_attn.o_proj": (shape.queries, C, shape.attention_bias),
            "mlp.gate_proj": (C, inner, shape.mlp_bias),
            "mlp.up_proj": (C, inner, shape.mlp_bias),
            "mlp.down_proj": (inner, C, shape.mlp_bias),
        }
        prefix = f"model.layers.{layer}"
        for name, (width_in, width_out, bias) in matrices.items():
            sizes[f"{prefix}.{name}.weight"] = width_in * width_out
            sizes |= {f"{prefix}.{name}.bias": width_out} if bias else {}
        sizes |= {f"{prefix}.self_attn.mem_gate": shape.num_attention_heads} if layer in gated else {}
        sizes |= {f"{prefix}.{name}_layernorm.weight": C for name in ("input", "post_attention")}
    sizes["model.norm.weight"] = C
    return sizes if shape.tie_word_embeddings else {**sizes, "lm_head.weight": shape.vocab_size * C}
