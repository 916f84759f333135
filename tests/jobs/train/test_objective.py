"""Who sees whom at a step, and the loss, for every objective."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.training import FotObjective, MemorizingObjective, StandardObjective, TransformerXlObjective
from jobs.train.objective import batch_loss, d_at, plan_of
from pipelines.batches.loader import TensorBatch
from pipelines.batches.sampler import IGNORE

STEPS = 40


def rows(groups: int, contexts: int, length: int = 6) -> TensorBatch:
    torch.manual_seed(groups)
    ids = torch.randint(0, 30, (groups * contexts, length))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[0, :3] = IGNORE
    return TensorBatch(
        input_ids=ids,
        labels=labels,
        document_ids=torch.arange(groups).repeat_interleave(contexts)[:, None].expand_as(ids),
        group=[group for group in range(groups) for _ in range(contexts)],
        segment=list(range(contexts)) * groups,
        related=[[one == other for other in range(groups)] for one in range(groups)],
        first=0,
    )


def seen(objective, step: int = 0, groups: int = 3) -> list[list[int]]:
    batch = rows(groups, objective.contexts)
    return [[row for row in line if row >= 0] for line in plan_of(objective, batch, step, seed=0).tolist()]


def test_the_standard_objective_has_no_plan() -> None:
    assert plan_of(StandardObjective(context=6), rows(3, 1), 0, 0) is None


def test_a_table_of_positives_and_negatives() -> None:
    plan = seen(FotObjective(context=6, segments=((0, 0), (1, 2))), groups=3)
    assert plan == [[], [0, 2, 4], [], [2, 4, 0], [], [4, 0, 2]]


def test_d_contexts_one_of_them_the_own() -> None:
    plan = seen(FotObjective(context=6, d=2, contexts=3), groups=3)
    assert plan[:3] == [[], [0, 3], [1, 4]]
    assert plan[6:] == [[], [6, 0], [7, 1]]


def test_the_memorizing_transformer_sees_all_of_its_past() -> None:
    assert seen(MemorizingObjective(context=6, contexts=3), groups=2) == [[], [0], [1, 0], [], [3], [4, 3]]


def test_transformer_xl_sees_the_context_before() -> None:
    assert seen(TransformerXlObjective(context=6, contexts=3), groups=2) == [[], [0], [1], [], [3], [4]]


def test_d_switches_at_its_step() -> None:
    objective = FotObjective.model_validate({"context": 6, "d": {"first": 2, "until": 10, "then": 64}})
    assert [d_at(objective, step, 0) for step in (0, 9, 10, STEPS)] == [2, 2, 64, 64]


@given(st.integers(0, 2**40), st.integers(0, 2**31))
def test_a_drawn_d_is_a_function_of_seed_and_step(step: int, seed: int) -> None:
    objective = FotObjective.model_validate({"context": 6, "d": {"of": [2, 128]}})
    assert d_at(objective, step, seed) == d_at(objective, step, seed)
    assert d_at(objective, step, seed) in (2, 128)


def test_ds_are_drawn_alike_and_otherwise_for_another_seed() -> None:
    objective = FotObjective.model_validate({"context": 6, "d": {"of": [2, 8, 128]}})
    drawn = [d_at(objective, step, 0) for step in range(3000)]
    assert all(900 < count < 1100 for count in Counter(drawn).values())
    assert drawn != [d_at(objective, step, 1) for step in range(3000)]


OBJECTIVES = [
    StandardObjective(context=6),
    FotObjective(context=6, d=3, contexts=2),
    MemorizingObjective(context=6, contexts=2),
    TransformerXlObjective(context=6, contexts=2),
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.kind)


def small_model(objective) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=6,
        mem_layers=[1],
        initializer_range=0.5,
        mem_gate=objective.kind == "memorizing",
    )
    return FotLlamaForCausalLM(config)


@every_objective
def test_the_loss_is_the_mean_over_labels_and_every_objective_sees_otherwise(objective) -> None:
    model = small_model(objective)
    batch = rows(3, objective.contexts)
    labels = int((batch.labels != IGNORE).sum())
    loss = batch_loss(model, batch, objective, 0, 0, labels)
    plan = plan_of(objective, batch, 0, 0)
    arguments = {} if plan is None else {"plan": plan, "objective": objective.kind}
    logits = model(batch.input_ids, use_cache=False, **arguments).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    if plan is not None:
        alone = batch_loss(model, batch, StandardObjective(context=6), 0, 0, labels)
        assert abs(alone - loss) > 1e-3


def joined(batch: TensorBatch) -> tuple[TensorBatch, list[list[tuple[int, int]]]]:
    """The batch with one to three documents in each of its rows, and where they lie: first token and end."""
    spans = [[[(0, 6)], [(0, 2), (2, 6)], [(0, 1), (1, 4), (4, 6)]][row % 3] for row in range(len(batch.labels))]
    ids, labels, documents = batch.input_ids, batch.input_ids.roll(-1, 1), batch.document_ids.clone()
    for row, own in enumerate(spans):
        for begin, end in own:
            documents[row, begin:end] = 10 * row + begin  # of each row its own
            labels[row, end - 1] = IGNORE
    return batch._replace(input_ids=ids, labels=labels, document_ids=documents), spans


@every_objective
def test_a_row_of_joined_documents_has_the_losses_of_its_documents_alone(objective) -> None:
    model = small_model(objective)
    batch, spans = joined(rows(3, 1))  # of the first contexts of groups, which see no others
    expected = torch.zeros(())
    for row, own in enumerate(spans):
        for begin, end in own:
            alone = model(batch.input_ids[row : row + 1, begin:end], use_cache=False).logits[0, :-1]
            expected += functional.cross_entropy(alone, batch.input_ids[row, begin + 1 : end], reduction="sum")
    one = objective.model_copy(update={"contexts": 1, "segments": None, "d": 1} if objective.contexts > 1 else {})
    torch.testing.assert_close(batch_loss(model, batch, one, 0, 0, 1), expected)
    together = one.model_copy(update={"separate_documents": False})
    assert abs(batch_loss(model, batch, together, 0, 0, 1) - expected) > 1e-2


def test_beside_additional_contexts_too_documents_do_not_see_the_others_of_their_row() -> None:
    objective = FotObjective(context=6, d=2, contexts=2)
    model = small_model(objective)
    batch, _ = joined(rows(3, 2))  # row 5, the last of its group, holds [0, 1), [1, 4), [4, 6)

    def loss_of_last(ids: torch.Tensor, objective: FotObjective) -> float:
        labels = torch.full_like(batch.labels, IGNORE)
        labels[5, 4:] = batch.labels[5, 4:]
        return batch_loss(model, batch._replace(input_ids=ids, labels=labels), objective, 0, 0, 1).item()

    whole = loss_of_last(batch.input_ids, objective)
    beside, before = batch.input_ids.clone(), batch.input_ids.clone()
    beside[5, :4] = (beside[5, :4] + 7) % 30
    before[4, :2] = (before[4, :2] + 7) % 30  # another document, in the context before: seen as a negative is
    assert loss_of_last(beside, objective) == pytest.approx(whole, abs=1e-6)
    assert abs(loss_of_last(before, objective) - whole) > 1e-4
    together = objective.model_copy(update={"separate_documents": False})
    assert abs(loss_of_last(beside, together) - loss_of_last(batch.input_ids, together)) > 1e-4
