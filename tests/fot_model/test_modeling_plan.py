"""Training with a plan: loss, gradients, documents joined in rows, compiled, and mistakes.

Shapes: R rows, L tokens, d additional contexts.
"""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fot_model import FotCache
from fot_model.plan import pad_plan


def test_a_step_trains_every_parameter_with_the_loss_of_all_rows(focused, tokens, trained, assert_same) -> None:
    model, ids_RL, plan_Rd = focused(num_key_value_heads=2).train(), tokens(3, 6), pad_plan([[], [0], [1, 0]])
    output = model(ids_RL, labels=ids_RL, plan=plan_Rd, skip_logits=False)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_RL[:, 1:].flatten())
    assert_same(output.loss, expected, 1e-6)
    assert output.past_key_values is None
    _, found = trained(model, ids_RL, plan=plan_Rd)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all((gradient != 0).any() for gradient in found.values())


def test_the_number_of_items_in_a_batch_divides_the_loss_with_a_plan(focused, tokens, assert_same) -> None:
    model, ids_RL = focused(), tokens(2, 6)
    how = {"labels": ids_RL, "plan": pad_plan([[], [0]])}
    assert_same(model(ids_RL, num_items_in_batch=7, **how).loss, model(ids_RL, **how).loss * 10 / 7)


def test_a_plan_that_names_rows_is_refused_by_a_model_without_memory_layers(focused, tokens) -> None:
    model, ids_RL = focused(mem_layers=[]), tokens(2, 6)
    with pytest.raises(ValueError, match=r"no memory layers .*mem_layers="):
        model(ids_RL, plan=pad_plan([[], [0]]))
    nobody = model(ids_RL, plan=torch.full((2, 1), -1)).logits
    assert (model(ids_RL, plan=pad_plan([[], [0]]), objective="transformer_xl").logits - nobody).abs().max() > 1e-3


def test_embeddings_and_kept_logits_go_with_a_plan(focused, tokens, assert_same) -> None:
    model, ids_RL, plan_Rd = focused(), tokens(2, 6), pad_plan([[], [0]])
    expected = model(ids_RL, plan=plan_Rd).logits
    embeddings_RLC = model.get_input_embeddings()(ids_RL)
    assert_same(model(inputs_embeds=embeddings_RLC, plan=plan_Rd).logits, expected, 1e-6)
    assert_same(model(ids_RL, plan=plan_Rd, logits_to_keep=2).logits, expected[:, -2:], 1e-6)
    [logits] = model(ids_RL, plan=plan_Rd, return_dict=False)
    assert torch.equal(logits, expected)


def test_a_mask_without_padding_changes_nothing_with_a_plan(focused, tokens) -> None:
    model, ids_RL, plan_Rd = focused(), tokens(2, 6), pad_plan([[], [0]])
    got = model(ids_RL, plan=plan_Rd, attention_mask=torch.ones_like(ids_RL)).logits
    assert torch.equal(got, model(ids_RL, plan=plan_Rd).logits)


def test_a_few_steps_of_gradient_descent_lower_the_loss(focused, tokens) -> None:
    model, ids_RL, plan_Rd = focused().train(), tokens(3, 6), pad_plan([[], [0], [1, 0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(ids_RL, labels=ids_RL, plan=plan_Rd).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


STEPS: list[tuple[int, int, int, int]] = [  # rows, tokens, additional contexts, tokens a document (0: not joined)
    (3, 6, 2, 0), (4, 6, 2, 0), (5, 8, 3, 0), (5, 8, 3, 3), (2, 7, 1, 5), (6, 9, 4, 0), (4, 12, 1, 4), (7, 5, 2, 0),
]  # fmt: skip
LATER = [(3, 10, 3, 2), (8, 11, 5, 0), (2, 9, 1, 3), (9, 4, 6, 0)]


def plan_of(R: int, L: int, d: int, joined: int) -> dict[str, Any]:
    plan = [list(range(row))[:d] + [-1] * max(0, d - row) for row in range(R)]
    documents = {"document_ids": torch.arange(L) // joined + 100 * torch.arange(R)[:, None]} if joined else {}
    return {"plan": torch.tensor(plan), **documents}


@pytest.mark.slow
def test_compiled_the_model_trains_the_same_whatever_the_shapes(
    focused, tokens, trained, gradients, assert_same, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    backend, model = CompileCounterWithBackend("eager"), focused(num_hidden_layers=2, local_context=8).train()
    compiled: Any = torch.compile(model, backend=backend)
    graphs = []
    for R, L, d, joined in (*STEPS, *LATER):
        ids_RL, how = tokens(R, L, seed=R), plan_of(R, L, d, joined)
        loss = compiled(ids_RL, labels=ids_RL, **how).loss
        loss.backward()
        assert_same((loss.detach(), gradients(model)), trained(model, ids_RL, **how))
        graphs.append(backend.frame_count)
    assert graphs[0] > 0
    assert graphs[len(STEPS) :] == graphs[-1:] * len(LATER), "what comes later is computed by the graphs that are there"
    torch._dynamo.reset()


def test_compiled_the_model_reads_the_same(focused, tokens, assert_same) -> None:
    torch._dynamo.reset()
    model = focused(num_hidden_layers=2, local_context=8)
    compiled: Any = torch.compile(model, backend="eager")
    caches: list[FotCache | None] = [None, None]
    with torch.no_grad():
        for part_BL in tokens(2, 40).split([20, 3, 1, 1, 1, 9, 5], dim=1):
            outputs = [
                each(part_BL, past_key_values=cache, use_cache=True)
                for each, cache in zip((compiled, model), caches, strict=True)
            ]
            assert torch.equal(outputs[0].logits, outputs[1].logits)
            caches = [output.past_key_values for output in outputs]
        for L in (5, 6, 7):
            ids_BL = tokens(2, L)
            assert_same(compiled(ids_BL, use_cache=False).logits, model(ids_BL, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("mem_layers", [[1], [0, 1, 2], []])
@pytest.mark.parametrize("plan", [[[], []], [[], [0]]])
def test_positions_that_start_again_keep_documents_apart_in_all_layers(
    focused, tokens, assert_same, plan: list[list[int]], mem_layers: list[int]
) -> None:
    """As a collator that flattens documents into rows gives them."""
    if not mem_layers and plan[1]:
        return
    model, ids_RL, plan_Rd = focused(mem_layers=mem_layers), tokens(2, 9), pad_plan(plan)
    positions_RL = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 0, 1, 2, 3, 4]])
    starts = [[0, 4], [0, 1, 4]]
    with torch.no_grad():
        got = model(ids_RL, position_ids=positions_RL, plan=plan_Rd).logits
        documents_RL = (positions_RL == 0).cumsum(1)
        assert torch.equal(
            model(ids_RL, position_ids=positions_RL, plan=plan_Rd, document_ids=documents_RL).logits, got
        )
        for row, firsts in enumerate(starts):
            for first, end in zip(firsts, [*firsts[1:], 9], strict=True):
                if not plan[row]:
                    assert_same(got[row, first:end], model(ids_RL[row : row + 1, first:end]).logits[0])
        other_RL = ids_RL.clone()
        other_RL[1, :4] = tokens(4, seed=1)
        assert_same(model(other_RL, position_ids=positions_RL, plan=plan_Rd).logits[1, 4:], got[1, 4:])


def test_positions_that_count_on_change_nothing_with_a_plan(focused, tokens) -> None:
    model, ids_RL, plan_Rd = focused(), tokens(2, 9), pad_plan([[], [0]])
    expected = model(ids_RL, plan=plan_Rd).logits
    for positions in (torch.arange(9)[None], torch.arange(9).expand(2, -1)):
        assert torch.equal(model(ids_RL, plan=plan_Rd, position_ids=positions).logits, expected)


DOCUMENTS = torch.zeros(2, 4, dtype=torch.long)

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "padding with a plan: give rows"),
    "cache": ({"past_key_values": "new"}, "past_key_values with a plan: in training"),
    "objective": ({"objective": "fott"}, "objective 'fott': give one of fot, memorizing, transformer_xl"),
    "documents of another shape": ({"document_ids": DOCUMENTS[:, :3]}, r"document_ids \[2, 3\]: give \[2, 4\]"),
    "documents by row": ({"document_ids": DOCUMENTS[:, 0]}, r"document_ids \[2\]: give \[2, 4\]"),
    "rows that are not there": ({"plan": pad_plan([[], [2]])}, "row 1 sees row 2, but the batch has rows 0 to 1"),
    "itself": ({"plan": pad_plan([[0], []])}, "row 0 sees itself"),
    "the future": ({"plan": pad_plan([[1], []]), "document_ids": DOCUMENTS}, "row 0 sees row 1, the future of its own"),
    "a plan of other rows": ({"plan": pad_plan([[], [], []])}, r"plan is a torch.int64 tensor \[3, 0\]: .*\[2, d\]"),
    "a flat plan": ({"plan": torch.tensor([-1, 0])}, r"\[2\]: give whole numbers \[2, d\]"),
    "a plan of fractions": ({"plan": torch.zeros(2, 1)}, r"torch.float32 .*give whole numbers"),
    "a plan that is a list": ({"plan": [[-1], [0]]}, r"plan is a list.*tensor"),
    "two previous contexts": (
        {"plan": pad_plan([[], [0, -1]]), "objective": "transformer_xl"},
        "transformer_xl sees one context, the previous: the plan has 2 columns",
    ),
    "documents without a plan, by row": ({"plan": None, "document_ids": DOCUMENTS[:, 0]}, r"give \[2, 4\]"),
    "positions of another shape": ({"position_ids": torch.arange(3)[None]}, r"position_ids \[1, 3\]: give \[2, 4\]"),
    "positions that begin later": ({"position_ids": torch.arange(5, 9)[None]}, "let them count from 0 in each row"),
    "positions that jump": ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "count from 0 .*in each document"),
    "positions that start again inside a document": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "document_ids": DOCUMENTS},
        "position_ids start again inside a document: document_ids must change",
    ),
    "positions that start again, with transformer_xl": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "objective": "transformer_xl"},
        "transformer_xl with position_ids that start again",
    ),
    "an objective without a plan": ({"plan": None, "objective": "memorizing"}, "objective .*with a plan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_with_a_plan_is_answered_by_what_is_wrong_and_what_to_do(focused, tokens, name: str) -> None:
    model, (how, message) = focused(mem_layers=[0]), MISTAKES[name]
    how = {"plan": pad_plan([[], [0]]), **how}
    if how.get("past_key_values") == "new":
        how["past_key_values"] = FotCache(model.config)
    with pytest.raises(ValueError, match=message) as error:
        model(tokens(2, 4), **how)
    assert "\n" not in str(error.value)
