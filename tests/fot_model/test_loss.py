"""The loss without all logits against the loss of all logits. Shapes: N tokens, C hidden size, V vocabulary."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fot_model import FotCache, FotLlamaForCausalLM, loss
from fot_model.loss import IGNORE, LmHead
from fot_model.plan import pad_plan

V, C = 40, 16


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens at a time."""
    monkeypatch.setattr(loss, "ENTRIES", 3 * V)


def head(dtype: torch.dtype = torch.float32) -> LmHead:
    torch.manual_seed(0)
    made = nn.Linear(C, V, bias=False, dtype=dtype)
    LmHead.adopt(made)
    assert isinstance(made, LmHead)
    return made


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states [2, 7, C] and labels [2, 7], three of which are ignored."""
    torch.manual_seed(1)
    labels = torch.randint(0, V, (2, 7))
    labels[0, 2] = labels[1, 5] = labels[1, 6] = IGNORE
    return (2 * torch.randn(2, 7, C)).to(dtype).requires_grad_(), labels


def whole(made: nn.Linear, hidden: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    logits = functional.linear(hidden, made.weight).flatten(0, 1)
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), reduction=reduction
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_the_sum_and_its_gradients_are_those_of_all_logits(dtype: torch.dtype, tolerance: float) -> None:
    made, (hidden, labels) = head(dtype), batch(dtype)
    got, expected = 0.3 * made(hidden, labels), 0.3 * whole(made, hidden, labels)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got, expected, rtol=min(tolerance, 1e-5), atol=0)
    inputs = (hidden, made.weight)
    for of_got, of_expected in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert of_got.dtype == dtype
        assert (of_got - of_expected).abs().max() <= tolerance * of_expected.abs().max()


@pytest.mark.parametrize("grad", [True, False])
def test_the_loss_of_each_token_is_that_of_all_logits_and_0_without_a_label(grad: bool) -> None:
    made, (hidden, labels) = head(), batch()
    with torch.set_grad_enabled(grad):
        got, expected = made(hidden, labels, "none"), whole(made, hidden, labels, "none").view(2, 7)
        torch.testing.assert_close(got, expected)
        assert (got[labels == IGNORE] == 0).all()
        torch.testing.assert_close(made(hidden, labels), expected.sum())
    assert got.requires_grad == grad
    if grad:
        weights = torch.randn(2, 7)
        inputs = (hidden, made.weight)
        of_got, of_expected = (torch.autograd.grad((x * weights).sum(), inputs) for x in (got, expected))
        torch.testing.assert_close(of_got, of_expected)


def test_without_any_label_the_sum_is_0_and_so_are_its_gradients() -> None:
    made, (hidden, labels) = head(), batch()
    got = made(hidden, torch.full_like(labels, IGNORE))
    got.backward()
    assert got == 0
    assert not hidden.grad.any()
    assert not made.weight.grad.any()


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    made, (hidden, labels) = head(), batch()
    labels[0, 0] = label
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        made(hidden, labels)


def test_a_graph_that_is_kept_is_differentiated_twice_alike() -> None:
    made, (hidden, labels) = head(), batch()
    got = made(hidden, labels)
    inputs = (hidden, made.weight)
    first, second = (torch.autograd.grad(got, inputs, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the shapes that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_never_more_logits_than_a_few_tokens_and_no_gradient_of_a_frozen_head(frozen: bool, grad: bool) -> None:
    made, (hidden, labels) = head(), batch()
    made.requires_grad_(not frozen)
    with torch.set_grad_enabled(grad), Largest() as seen:
        got = made(hidden, labels)
        if grad:
            got.backward()
    assert max(shape[0] for shape in seen.shapes if shape and shape[-1] == V and shape != (C, V)) == 3
    assert ((V, C) in seen.shapes) == (grad and not frozen)
    assert (hidden.grad is not None) == grad
    assert (made.weight.grad is not None) == (grad and not frozen)


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models in training, with contexts of 8 tokens."""
    return lambda **changes: focused(num_hidden_layers=2, max_position_embeddings=8, **changes).train()


IDS = torch.randint(0, V, (3, 8), generator=torch.Generator().manual_seed(2))
PLAN = {"plan": pad_plan([[], [0], [1, 0]])}


def loss_and_gradients(made: FotLlamaForCausalLM, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    made.zero_grad()
    output = made(IDS, use_cache=False, **how)
    assert (output.logits is None) == how.get("skip_logits", made.training)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", [{}, PLAN, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}])
def test_a_model_trains_without_its_logits_as_with_them(focused, tied: bool, how: dict[str, Any]) -> None:
    made = focused(tie_word_embeddings=tied)
    labels = IDS.clone()
    labels[1, 3:6] = IGNORE
    got, expected = (loss_and_gradients(made, labels=labels, skip_logits=skips, **how) for skips in (True, False))
    torch.testing.assert_close(got, expected)
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    torch.testing.assert_close(loss_and_gradients(made, shift_labels=shifted, **how), expected)


def test_under_autocast_too(focused) -> None:
    made = focused()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (loss_and_gradients(made, labels=IDS, skip_logits=skips, **PLAN) for skips in (True, False))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=0)
    for name, gradient in expected[1].items():
        assert got[1][name].dtype == torch.float32
        assert (got[1][name] - gradient).norm() <= 0.02 * gradient.norm()


def test_a_head_of_another_number_of_tokens_still_works_in_parts(focused) -> None:
    made = focused()
    made.resize_token_embeddings(V + 8, mean_resizing=False)
    assert isinstance(made.lm_head, LmHead)
    torch.testing.assert_close(*(loss_and_gradients(made, labels=IDS, skip_logits=skips) for skips in (True, False)))


def test_a_loss_of_ones_own_gets_the_logits(focused) -> None:
    made = focused()
    made.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    got, _ = loss_and_gradients(made, labels=IDS)
    torch.testing.assert_close(got, made(IDS, use_cache=False).logits.sum())


def test_in_reading_each_token_has_its_loss(focused) -> None:
    made, ids = focused().eval(), torch.cat([IDS, IDS.flip(0)], dim=1)
    with torch.no_grad():
        logits = made(ids[:, :-1]).logits
        expected = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        given: dict[str, Any] = {"reduction": "none", "past_key_values": FotCache(made.config)}
        for skips in (True, False):
            output = made(ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=skips, reduction="none")
            torch.testing.assert_close(output.loss, expected)
            assert (output.logits is None) == skips
        last = made(ids[:, :-1], shift_labels=ids[:, -2:], skip_logits=True, logits_to_keep=2, **given).loss
    torch.testing.assert_close(last, expected[:, -2:])


def test_labels_for_other_positions_are_refused(focused) -> None:
    with pytest.raises(ValueError, match=r"labels \[3, 7\]: give \[3, 8\], one for each position that is kept"):
        focused()(IDS, shift_labels=IDS[:, 1:], use_cache=False)
    with pytest.raises(ValueError, match="reduction 'sum': give mean or none"):
        focused()(IDS, labels=IDS, reduction="sum")
