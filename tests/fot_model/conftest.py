"""A FoT model small enough for tests, and what many of them do with it.

Test modules cannot import each other: what they share are plain functions, given out by fixtures that live as long as
the session, so that hypothesis may use them too.

Shapes: B batch, R rows, L tokens, C hidden size, V vocabulary, H query heads, Hk key/value heads, D head size.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, attention

TINY = MappingProxyType(
    {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
)


@pytest.fixture(scope="session")
def tiny() -> Mapping[str, Any]:
    """The shape of the models: of a LLaMA, without memory layers."""
    return TINY


@pytest.fixture(scope="session")
def conformance() -> Path:
    """What the reference implementation computed (README.md there)."""
    return Path(__file__).parent / "conformance"


@pytest.fixture(scope="session")
def randomised() -> Callable[[Any], Any]:
    """Makes all parameters random: biases, norms and gates too, which start at constants."""

    def randomise(model: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return randomise


@pytest.fixture(scope="session")
def focused(randomised) -> Callable[..., FotLlamaForCausalLM]:
    """Makes a random model of the tiny shape with changes; layer 1 is a memory layer. Each is a copy of its own."""
    made: dict[str, FotLlamaForCausalLM] = {}  # to copy one is faster than to make it

    def make(seed: int = 0, **changes: Any) -> FotLlamaForCausalLM:
        torch.manual_seed(seed)
        key = repr((seed, sorted(changes.items())))
        if key not in made:
            config = FotLlamaConfig(**{**TINY, "mem_layers": [1], **changes})
            made[key] = randomised(FotLlamaForCausalLM(config), seed)
        return copy.deepcopy(made[key])

    return make


@pytest.fixture(scope="session")
def llama(randomised) -> Callable[..., LlamaForCausalLM]:
    """Makes a random LLaMA of the tiny shape with changes."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return randomised(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})))

    return make


@pytest.fixture(scope="session")
def plain() -> Callable[[FotLlamaForCausalLM], LlamaForCausalLM]:
    """Makes a LLaMA with the same weights."""

    def make(model: FotLlamaForCausalLM) -> LlamaForCausalLM:
        fields = model.config.to_dict()
        base = LlamaForCausalLM(
            LlamaConfig(**{name: fields[name] for name in LlamaConfig().to_dict() if name != "model_type"})
        )
        base.load_state_dict(model.state_dict())
        return base.eval()

    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Draws token ids without 0, which is padding."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    def compare(got: Any, expected: Any, atol: float = 1e-5, what: str = "") -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda found: f"{what} {found}")

    return compare


@pytest.fixture(scope="module")
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["fused kernel", "written out"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of doing a part of attention on CPU: with torch's fused kernel, and with the formula written out."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "written out":
            patch.setattr(attention, "_fused", lambda _q_BHLD: False)
        yield request.param


# Training


@pytest.fixture(scope="session")
def gradients() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Those of the last backward pass, which are forgotten."""

    def take(model: nn.Module) -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    return take


@pytest.fixture(scope="session")
def trained(gradients) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of a step."""

    def step(model: Any, ids_RL: Tensor, labels_RL: Tensor | None = None, **how: Any) -> Any:
        loss = model(ids_RL, labels=ids_RL if labels_RL is None else labels_RL, **how).loss
        loss.backward()
        return loss.detach(), gradients(model)

    return step


def draw_cross_batch_tensors(
    seed: int, R: int, H: int, Hk: int, L: int, D: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (H, Hk, Hk, Hk, Hk)
    return [torch.randn(R, n, L, D, generator=generator, dtype=dtype).requires_grad_() for n in heads]


@pytest.fixture(scope="session")
def cross_batch_tensors() -> Callable[..., list[Tensor]]:
    """Draws queries [R, H, L, D], and local keys, local values, far keys, far values [R, Hk, L, D]."""
    return draw_cross_batch_tensors


class CrossBatchCase:
    """A batch of 1 to 4 rows; which others each sees, in any order, with holes (-1) anywhere; perhaps documents."""

    scale = 0.7

    def __init__(self, draw: st.DrawFn) -> None:
        R, width = draw(st.integers(1, 4)), draw(st.integers(0, 4))
        self.plan = []
        for row in range(R):
            others = [other for other in range(R) if other != row]
            seen = draw(st.permutations(others))[: draw(st.integers(0, min(width, len(others))))]
            self.plan.append(draw(st.permutations(seen + [-1] * (width - len(seen)))))
        self.Hk, self.G, self.L = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
        ids = st.lists(st.integers(0, 2), min_size=self.L, max_size=self.L)
        self.documents = draw(st.none() | st.lists(ids, min_size=R, max_size=R))
        self.local, self.seed = draw(st.booleans()), draw(st.integers(0, 2**32))

    def __repr__(self) -> str:
        return f"CrossBatchCase({vars(self)})"

    def tensors(self, D: int) -> list[Tensor]:
        return draw_cross_batch_tensors(self.seed, len(self.plan), self.Hk * self.G, self.Hk, self.L, D)

    def how(self) -> tuple[Tensor, float, Tensor | None, bool]:
        documents_RL = None if self.documents is None else torch.tensor(self.documents)
        return torch.tensor(self.plan, dtype=torch.long), self.scale, documents_RL, self.local


@pytest.fixture(scope="session")
def cross_batch_cases() -> st.SearchStrategy[CrossBatchCase]:
    """What hypothesis draws."""
    return st.composite(CrossBatchCase)()


# Reading


@pytest.fixture(scope="session")
def padded(tokens) -> Callable[[list[int], int], tuple[Tensor, Tensor]]:
    """Draws ids [B, L] and their mask [B, L]: rows of these lengths, padded on the left."""

    def draw(lengths: list[int], L: int) -> tuple[Tensor, Tensor]:
        mask_BL = torch.stack([torch.arange(L) >= L - length for length in lengths]).long()
        return tokens(len(lengths), L) * mask_BL, mask_BL

    return draw


@pytest.fixture(scope="session")
def read_parts() -> Callable[..., list[Tensor]]:
    """Reads in several calls; gives the logits of each."""

    def read(
        model: FotLlamaForCausalLM, parts: list[Tensor], cache: FotCache | None = None, **how: Any
    ) -> list[Tensor]:
        logits = []
        for part in parts:
            output = model(part, past_key_values=cache, use_cache=True, **how)
            cache = output.past_key_values
            logits.append(output.logits)
        return logits

    return read


@pytest.fixture(scope="session")
def left_padding() -> Callable[[bool, int], Tensor | None]:
    """Three rows' mask [3, L]: no padding, three tokens, nearly all; or none."""

    def make(is_padded: bool, L: int) -> Tensor | None:
        return torch.arange(L) >= torch.tensor([[0], [3], [L - 2]]) if is_padded else None

    return make


@pytest.fixture(scope="session")
def read() -> Callable[..., Tensor]:
    """Reads on from a cache; gives the logits [B, L, V], 0 for padding."""

    def read_on(model: Any, cache: FotCache, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        mask = None if mask_BL is None else mask_BL.long()
        logits = model(ids_BL, attention_mask=mask, past_key_values=cache).logits
        return logits if mask_BL is None else logits.where(mask_BL[:, :, None], 0)

    return read_on


@pytest.fixture(scope="session")
def fresh(read) -> Callable[..., FotCache]:
    """Makes a cache that has read these texts, the first with this mask."""

    def make(model: Any, *texts: Tensor, mask: Tensor | None = None, memory: DenseMemory | None = None) -> FotCache:
        cache = FotCache(model.config, memory)
        for at, ids_BL in enumerate(texts):
            read(model, cache, ids_BL, None if at else mask)
        return cache

    return make


@pytest.fixture(scope="session")
def goes_on(tokens, read) -> Callable[..., list[Tensor]]:
    """Logits of a question, two tokens of an answer one by one, and another question."""

    def ask(model: Any, cache: FotCache) -> list[Tensor]:
        assert cache.rows is not None
        questions = [tokens(1, length, seed=50 + length).expand(cache.rows, -1) for length in (5, 1, 1, 9)]
        return [read(model, cache, question) for question in questions]

    return ask


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
SETUPS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "padded": ({}, True),
    "last context": ({"last_context_length": 4}, False),
    "padded last context": ({"last_context_length": 4}, True),
    "bfloat16 memory": ({"mem_dtype": "bfloat16"}, True),
    "no positions": ({"mem_positionals": False}, False),
    "yarn": ({"rope_parameters": YARN, "mem_layers": [0, 2]}, True),
}


@pytest.fixture(params=SETUPS.values(), ids=SETUPS)
def setup(request: pytest.FixtureRequest) -> tuple[dict[str, Any], bool]:
    """How a cache is tried: changes of the configuration, and whether there is padding."""
    return request.param


WINDOW = 16  # of the models that `kind` changes
THETA = {"rope_theta": 10000.0}
KINDS: dict[str, dict[str, Any]] = {
    "rope default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}},
    "rope dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}},
    "rope yarn": {"rope_parameters": {**YARN, "original_max_position_embeddings": 4}},
    "rope longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "factor": 3.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": WINDOW,
            **THETA,
        }
    },
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
            **THETA,
        }
    },
    "no positions": {"mem_positionals": False},
    "yarn, no positions": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 4},
        "mem_positionals": False,
    },
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "first and last": {"mem_layers": [0, 2]},
    "all layers": {"mem_layers": [0, 1, 2]},
    "odd window": {"local_context": 7},
    "window of two": {"local_context": 2},
    "gate": {"mem_gate": True},
    "bias": {"attention_bias": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How models that read differ: changes of the configuration."""
    return request.param


@pytest.fixture(scope="session")
def any_kind() -> st.SearchStrategy[dict[str, Any]]:
    """One of the changes that `kind` tries, as hypothesis draws it."""
    return st.sampled_from(list(KINDS.values()))
