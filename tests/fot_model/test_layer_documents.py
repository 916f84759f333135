"""Documents joined in a row are kept apart.

Shapes: R rows, L tokens a context, d additional contexts, V vocabulary.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional

from fot_model.plan import pad_plan

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 12, [3] * 2 + [4] * 9 + [5]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mem_layers", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("objective", ["fot", "memorizing", "transformer_xl"])
def test_documents_joined_in_a_row_are_read_as_each_alone(
    focused, tokens, assert_same, objective: str, mem_layers: list[int], implementation: str
) -> None:
    model, ids_RL = focused(mem_layers=mem_layers, num_key_value_heads=2), tokens(3, 12)
    model.set_attn_implementation(implementation)
    plan_Rd = pad_plan([[], [], []])
    logits_RLV = model(ids_RL, plan=plan_Rd, objective=objective, document_ids=DOCUMENTS).logits
    for row, documents in enumerate(DOCUMENTS):
        for document in documents.unique():
            own_L = documents == document
            assert_same(logits_RLV[row, own_L], model(ids_RL[row : row + 1, own_L], use_cache=False).logits[0])


@pytest.mark.parametrize("mem_layers", [[], [1]])
def test_documents_without_a_plan_are_kept_apart_too(focused, tokens, mem_layers: list[int]) -> None:
    model, ids_RL = focused(mem_layers=mem_layers), tokens(3, 12)
    expected = model(ids_RL, plan=pad_plan([[], [], []]), document_ids=DOCUMENTS).logits
    assert torch.equal(model(ids_RL, document_ids=DOCUMENTS).logits, expected)
    assert (model(ids_RL, use_cache=False).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("how", [{}, {"plan": pad_plan([[], [0], [1]])}], ids=["no plan", "plan"])
def test_where_no_row_joins_documents_no_mask_is_made(
    focused, tokens, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids_RL = focused(), tokens(3, 12)
    masks = []
    plain = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, **given: masks.append((given["attn_mask"], given["is_causal"])) or plain(*args, **given),
    )
    whole = model(ids_RL, document_ids=torch.tensor([[4] * 12, [4] * 12, [7] * 12]), **how).logits
    assert masks == [(None, True)] * 2  # the third is the memory layer
    assert torch.equal(whole, model(ids_RL, use_cache=False, **how).logits)
    masks.clear()
    model(ids_RL, document_ids=DOCUMENTS, **how)
    assert [mask.shape for mask, _ in masks] == [(3, 1, 12, 12)] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_of_one_document_is_the_row_without_documents(focused, tokens, assert_same, implementation: str) -> None:
    model, ids_RL, plan_Rd = focused(), tokens(3, 12), pad_plan([[], [], [1]])
    model.set_attn_implementation(implementation)
    joined, apart = (model(ids_RL, plan=plan_Rd, **how).logits for how in ({"document_ids": DOCUMENTS}, {}))
    assert_same(joined[1], apart[1])
    assert (joined[2] - apart[2]).abs().max() > 1e-2


def test_rows_that_see_joined_documents_see_all_of_the_row(focused, tokens, assert_same) -> None:
    model, ids_RL = focused(mem_layers=[0], num_hidden_layers=1), tokens(3, 12)
    joined, apart = (
        model(ids_RL, plan=pad_plan([[], [0], []]), **how).logits for how in ({"document_ids": DOCUMENTS}, {})
    )
    assert_same(joined[1], apart[1])


def test_documents_are_refused_for_attention_that_has_no_mask_of_scores(focused, tokens) -> None:
    model, ids_RL = focused(), tokens(3, 12)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"document_ids .*'flash_attention_2'.*'sdpa'"):
        model(ids_RL, plan=pad_plan([[], [], []]), document_ids=DOCUMENTS)


@pytest.mark.parametrize("mem_layers", [[], [1]])
def test_lengths_without_positions_are_refused(focused, tokens, mem_layers: list[int]) -> None:
    """transformers' attentions but flash ignore them; a collator that flattens gives both."""
    model, ids_RL = focused(mem_layers=mem_layers), tokens(1, 12)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "cu_seq_lens_k": torch.tensor([0, 5, 12])}
    with pytest.raises(ValueError, match="position_ids that start again"):
        model(ids_RL, use_cache=False, **lengths)
