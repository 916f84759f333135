"""The training parts of a recipe: what is refused, and with which words."""

import pytest
from pydantic import ValidationError

from jobs.config.training import LONGLLAMA_3B, Auto, FotObjective, Resources, Training, auto_layers, named_layers

FOT = {"kind": "fot", "context": 16}


def training(**changes: object) -> dict:
    return {"objective": FOT, "steps": 10, **changes}


def test_without_a_plan_the_objective_is_longllama_3bs() -> None:
    objective = FotObjective(context=16)
    assert (objective.segments, objective.contexts, objective.d) == (LONGLLAMA_3B, 4, None)


def test_a_table_says_how_many_contexts_a_group_has() -> None:
    assert FotObjective(context=16, segments=((0, 0), (1, 0))).contexts == 2
    assert FotObjective(context=16, d=3).contexts == 4
    assert FotObjective(context=16, d=3, contexts=2).segments is None


def test_a_training_is_read_again_from_what_it_was_written_as() -> None:
    for objective in (FOT, {**FOT, "d": {"of": [2, 128]}}, {**FOT, "d": {"first": 2, "until": 5, "then": 4}}):
        made = Training.model_validate(training(objective=objective, batch={"groups": 128}))
        assert Training.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {**FOT, "d": 2, "segments": [[0, 0], [1, 0]]}}, "has both segments and d"),
        ({"objective": {**FOT, "segments": [[0, 0], [2, 0]]}}, "segment 1 asks for 2 positives, only 1 contexts"),
        ({"objective": {**FOT, "segments": [[0, 0], [1, 0]], "contexts": 3}}, "contexts is 3, segments has 2"),
        ({"objective": {**FOT, "d": 5}}, "d is 5, a micro-batch holds 4 document groups: raise batch.groups to 5"),
        ({"objective": {**FOT, "d": {"of": [2, 9]}}}, "d is 9, a micro-batch holds 4"),
        ({"objective": {**FOT, "d": {"first": 2, "until": 5, "then": 8}}}, "d is 8, a micro-batch holds 4"),
        (
            {"objective": {**FOT, "segments": [[0, 0], [1, 5]]}, "batch": {"groups": 3}},
            "asks for 5 negatives, a micro-batch of 3 groups holds 4 contexts of other documents: raise batch.groups "
            "to 4",
        ),
        ({"optimizer": {"groups": [{"pattern": "("}]}}, "no regular expression"),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": True}}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"deepspeed": {"zero_stage": 2, "offload_parameters": True}}, "offload_parameters needs zero_stage 3"),
        ({"deepspeed": {"zero_stage": 4}}, "Input should be 0, 1, 2 or 3"),
        ({"objective": {"kind": "memorizing", "context": 16, "contexts": 1}}, "greater than or equal to 2"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Training.model_validate(training(**changes))
    assert message in str(caught.value)


def test_ranks_form_whole_teams() -> None:
    assert Resources(workers=4, ranks_per_micro_batch=2).workers == 4
    with pytest.raises(ValidationError, match=r"resources.workers \(3\) is not a multiple"):
        Resources(workers=3, ranks_per_micro_batch=2)


def test_memory_layers_are_numbers_or_a_probes_choice() -> None:
    for given, layers, auto in (
        ([3, 1], (3, 1), None),
        ("auto", (), Auto()),
        ({"auto": 4}, (), Auto(auto=4)),
        (None, (), None),
    ):
        made = Training.model_validate(training(objective={**FOT, "mem_layers": given}))
        assert (named_layers(made.objective), auto_layers(made.objective)) == (layers, auto)
        assert Training.model_validate(made.model_dump(mode="json")) == made
    assert named_layers(made.with_mem_layers([5, 7]).objective) == (5, 7)
    assert made.with_mem_layers([]).objective.mem_layers is None


@pytest.mark.parametrize("given", [[], [-1], [True], "all", {"auto": 0}, {"auto": 2, "more": 1}, {}, 3, [1.5]])
def test_other_memory_layers_are_one_line(given: object) -> None:
    with pytest.raises(ValidationError) as error:
        Training.model_validate(training(objective={**FOT, "mem_layers": given}))
    assert error.value.error_count() == 1
    assert "give layer numbers, such as [8, 15], auto, or {auto: 4}" in str(error.value)
