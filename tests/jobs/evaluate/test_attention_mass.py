from pathlib import Path

import numpy as np
import pytest
import torch

from fot_model import FotLlamaForCausalLM, TopKMemory, attention_mass
from fot_model.plan import pad_plan
from jobs.config.evaluation import AttentionMassSettings, MemorySettings
from jobs.evaluate import attention_mass as module
from jobs.evaluate.subject import Subject, load_model, new_cache, open_documents
from pipelines.workflow.errors import UserError

LOCAL = 16  # as the model of the fixtures
LENGTHS = {"books": [70, 200, 90], "code": [120, 40]}
DEEPER = {"num_hidden_layers": 3, "mem_layers": [1, 2], "mem_positionals": True}


@pytest.fixture(scope="module")
def subject(subject_of) -> Subject:
    return subject_of(LENGTHS)


def by_metric(result) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for point in result.points:
        found.setdefault(point.metric, {})[point.step] = point.value
    return found


def test_it_is_what_training_measures_on_the_same_contexts(subject: Subject, measure, monkeypatch) -> None:
    settings = AttentionMassSettings(d=(1, 3, 7), samples=1)
    contexts = []

    def seen(model, memory, contexts_NL: torch.Tensor) -> None:
        contexts.append(contexts_NL)
        read_beside(model, memory, contexts_NL)

    read_beside = module.read_beside
    monkeypatch.setattr(module, "read_beside", seen)
    found = by_metric(measure(module, subject, settings))
    dataset = open_documents(subject)
    (window,) = module._windows(dataset, LOCAL, settings)
    own = dataset.tokens(window.document, window.start - LOCAL, window.start + LOCAL).astype(np.int64)
    assert contexts[0][0].tolist() == own[:LOCAL].tolist(), "the positive is the window before"
    model = load_model(subject.model, subject.model)
    for d in settings.d:
        rows_RL = torch.cat([contexts[0][:d], torch.from_numpy(own[LOCAL:])[None]])
        documents_R = torch.tensor([0, *range(1, d), 0])
        with torch.no_grad(), attention_mass(model, documents_R) as mass:
            model(rows_RL, plan=pad_plan([*([] for _ in range(d)), list(range(d))]))
        assert found["attention_mass/layer0"][d] == pytest.approx(mass.r_d()[0], rel=1e-4)
        best = mass.layers[0].share().max().item()
        assert found["attention_mass/layer0_best_head"][d] == pytest.approx(best, rel=1e-4)
    assert found["attention_mass/layer0"][1] == 1.0


def test_every_memory_layer_has_its_curve_and_the_best_head_is_above_the_mean(
    subject: Subject, save_model, measure, tmp_path: Path
) -> None:
    deeper = Subject({"model": save_model(**DEEPER)}, LOCAL, 0, shards=subject.shards, documents=subject.documents)
    result = measure(module, deeper, AttentionMassSettings(d=(4, 2), samples=3))
    found = by_metric(result)
    names = [f"attention_mass/layer{layer}{kind}" for layer in (1, 2) for kind in ("", "_best_head")]
    assert list(found) == names
    assert all(list(curve) == [2, 4] for curve in found.values())
    for layer in (1, 2):
        for d in (2, 4):
            assert found[f"attention_mass/layer{layer}_best_head"][d] > found[f"attention_mass/layer{layer}"][d] > 0
    assert result.tables[0].columns == ["d", *(name.split("/")[1] for name in names), "1/d"]
    assert (tmp_path / result.plots[0]).exists()


def test_contexts_are_read_without_each_other(save_model) -> None:
    model = FotLlamaForCausalLM.from_pretrained(save_model(**DEEPER)).eval()
    contexts_NL = torch.randint(2, 280, (5, LOCAL), generator=torch.Generator().manual_seed(0))
    together = new_cache(model, MemorySettings()).memory
    with torch.inference_mode():
        module.read_beside(model, together, contexts_NL)
        for place, context_L in enumerate(contexts_NL):
            alone = new_cache(model, MemorySettings()).memory
            module.read_beside(model, alone, context_L[None])
            for name, tensor in alone.state_dict().items():
                span = together.state_dict()[name][:, :, place * LOCAL : (place + 1) * LOCAL]
                torch.testing.assert_close(span, tensor, rtol=1e-4, atol=1e-5)


def test_negatives_are_of_other_documents_that_are_no_copies(subject_of, monkeypatch) -> None:
    subject = subject_of({"s": [64, 40, 64, 50]}, same_text=[2])
    read = []
    monkeypatch.setattr(
        module, "read_windows", lambda _, windows, __: read.append(windows) or np.zeros((1, LOCAL), int)
    )
    dataset = open_documents(subject)
    asks = next(
        window for window in module._windows(dataset, LOCAL, AttentionMassSettings(samples=9)) if window.document == 0
    )
    with torch.inference_mode():
        module.measure(subject, asks, [1])
        assert [window.document for window in read[0]] == [0]
        with pytest.raises(ValueError, match="truncate"):  # what was read in their place is one context
            module.measure(subject, asks, [6])
    assert read[2][0].document == 0
    assert {window.document for window in read[2][1:]} == {1, 3}


def test_top_k_memory_is_measured_over_all_of_it(subject: Subject, measure) -> None:
    settings = AttentionMassSettings(d=(4,), samples=2)
    few = Subject(subject.models, LOCAL, 0, MemorySettings(top_k=2), subject.shards, subject.documents)
    assert isinstance(new_cache(load_model(subject.model, subject.model), few.memory).memory, TopKMemory)
    assert by_metric(measure(module, few, settings)) == by_metric(measure(module, subject, settings))


def test_a_model_without_memory_layers_is_a_users_error(subject: Subject, save_model) -> None:
    plain = Subject({"model": save_model(mem_layers=[])}, LOCAL, 0, shards=subject.shards, documents=subject.documents)
    with pytest.raises(UserError, match="has no memory layers: leave it out"):
        module.cells(plain, AttentionMassSettings(d=(1,), samples=1))


def test_fewer_contexts_than_d_are_a_users_error_that_says_the_largest(subject: Subject) -> None:
    there = sum(size // LOCAL for size in (70, 90, 120, 40))  # beside the longest document
    with pytest.raises(UserError, match=f"there are {there}: lower it to at most {there + 1},"):
        module.cells(subject, AttentionMassSettings(d=(1, there + 2), samples=20))
    module.cells(subject, AttentionMassSettings(d=(1, there + 1), samples=20))
