"""How far a training's backward pass goes, and what of the forward pass it needs: formulas over names of parameters.

A gradient flows down from the loss to the lowest trained parameter and ends there. So a matrix product costs its
forward pass; again as much where its input needs a gradient, for something below it is trained; and again as much where
its weight is trained. Autograd keeps the input of a product for its weight's gradient alone, what attention and SwiGLU
computed where a gradient passes through them, and nothing below.

C hidden size, I intermediate size, Hq query heads, Hk key/value heads, D head size, w bytes a number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from jobs.config.training import Training
from jobs.models.layers import gated_layers, memory_layer_numbers
from jobs.models.shape import Shape, parameter_sizes
from jobs.models.trained import layer_of, lora_modules, trained_names, whole_beside_lora

# The parts of a layer in the order in which they are computed.
PARTS = ("input_layernorm", "q_proj", "attention", "o_proj", "post_attention_layernorm", "up_proj", "down_proj")
BESIDE = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj", "mem_gate": "attention"}
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Place = tuple[float, int]
TOP: Place = (math.inf, 0)


@dataclass(frozen=True)
class Backward:
    """`sizes`: numbers of each parameter; `trained`: names of those that are trained; `pairs`: (input, output) widths
    of the modules that LoRA's pairs of `rank` are trained beside."""

    shape: Shape
    sizes: Mapping[str, int]
    trained: frozenset[str]
    pairs: Mapping[str, tuple[int, int]]
    rank: int

    @classmethod
    def of(cls, shape: Shape, training: Training) -> Self:
        """Raises UserError where the training names parameters that the model lacks."""
        layers = shape.num_hidden_layers
        sizes = parameter_sizes(shape, gated_layers(training.objective, layers))
        scope = trained_names(training, list(sizes), memory_layer_numbers(training.objective, layers))
        if training.lora is None:
            return cls(shape, sizes, frozenset(scope), {}, 0)
        pairs = {module: widths(shape, module) for module in lora_modules(training, scope)}
        return cls(shape, sizes, frozenset(filter(whole_beside_lora, scope)), pairs, training.lora.rank)

    @property
    def pair_parameters(self) -> int:
        """Numbers in LoRA's pairs."""
        return self.rank * sum(map(sum, self.pairs.values()))

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.sizes.values()) + self.pair_parameters

    @property
    def trained_parameters(self) -> int:
        return sum(self.sizes[name] for name in self.trained) + self.pair_parameters

    @property
    def trains_head(self) -> bool:
        """Whether the output's weights are trained, its own or the embedding's."""
        return (EMBEDDINGS if self.shape.tie_word_embeddings else OUTPUT) in self.trained

    @property
    def lowest(self) -> int:
        """The lowest layer that a gradient reaches; the number of layers where it reaches none."""
        return int(max(0, min(self._first[0], self.shape.num_hidden_layers)))

    @property
    def _first(self) -> Place:
        """Where the lowest trained parameter lies."""
        return min(place(name) for name in (*self.trained, *(f"{module}.weight" for module in self.pairs)))

    def flows_into(self, layer: float, part: int = 0) -> bool:
        """Whether the input of a part needs a gradient."""
        return self._first < (layer, part)

    def reaches_attention(self, layer: int) -> bool:
        return self.flows_into(layer, PARTS.index("attention"))

    def matrix_flops(self) -> int:
        """FLOPs of a token in matrix products, forward and backward."""
        output = EMBEDDINGS if self.shape.tie_word_embeddings else OUTPUT
        matrices = {name: place(name) for name in self.sizes if name.endswith("_proj.weight")} | {output: TOP}
        products = sum(
            self.sizes[name] * (2 + 2 * (self._first < where) + 2 * (name in self.trained))
            for name, where in matrices.items()
        )
        for module, (width_in, width_out) in self.pairs.items():
            into_first = 2 * (self._first < place(f"{module}.weight"))
            products += self.rank * (width_in * (4 + into_first) + 6 * width_out)
        return products

    def layer_bytes(self, layer: int, width: int) -> int:
        """Bytes that autograd keeps of a token in a layer, without far keys and values."""
        shape, name = self.shape, f"model.layers.{layer}"
        C, inner = shape.hidden_size, shape.intermediate_size
        kept = 0
        for norm, following in (("input", ("q", "k", "v")), ("post_attention", ("gate", "up"))):
            part = f"{norm}_layernorm"
            kept += 4 * C * self.flows_into(layer, PARTS.index(part))
            kept += width * C * (f"{name}.{part}.weight" in self.trained)
            kept += width * C * any(self._keeps_input(layer, projection) for projection in following)
        if self.reaches_attention(layer):
            kept += 2 * width * (shape.queries + shape.keys) + 4 * shape.num_attention_heads
        elif self._keeps_input(layer, "o"):
            kept += width * shape.queries
        kept += 3 * width * inner * self.flows_into(layer, PARTS.index("down_proj"))
        kept += width * inner * self._keeps_input(layer, "down")
        return kept + width * self.rank * sum(layer_of(f"{module}.") == layer for module in self.pairs)

    def last_norm_bytes(self, width: int) -> int:
        """The same of the last norm, and the loss's input, which it keeps whatever is trained."""
        kept = 4 * (self._first < (math.inf, -1)) + width * ("model.norm.weight" in self.trained) + width
        return kept * self.shape.hidden_size

    def _keeps_input(self, layer: int, projection: str) -> bool:
        block = "mlp" if projection in ("gate", "up", "down") else "self_attn"
        module = f"model.layers.{layer}.{block}.{projection}_proj"
        return f"{module}.weight" in self.trained or module in self.pairs


def place(name: str) -> Place:
    """Where a parameter is used, in the order of the forward pass: layer and part of it."""
    if (layer := layer_of(name)) is None:
        return {EMBEDDINGS: (-1, 0), OUTPUT: TOP}.get(name, (math.inf, -1))
    parts = name.split(".")
    part = next(part for part in parts[3:] if part in PARTS or part in BESIDE)
    return layer, PARTS.index(BESIDE.get(part, part))


def widths(shape: Shape, module: str) -> tuple[int, int]:
    """Input and output width of a projection."""
    C, inner = shape.hidden_size, shape.intermediate_size
    return {
        "q_proj": (C, shape.queries),
        "k_proj": (C, shape.keys),
        "v_proj": (C, shape.keys),
        "o_proj": (shape.queries, C),
        "gate_proj": (C, inner),
        "up_proj": (C, inner),
        "down_proj": (inner, C),
    }[module.rpartition(".")[2]]
