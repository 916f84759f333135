import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fot_model import FotLlamaForCausalLM
from jobs.config.evaluation import Perplexity
from jobs.evaluate import perplexity as module
from jobs.evaluate.losses import read_losses
from jobs.evaluate.subject import Reading, Subject, load_model, open_documents
from jobs.evaluate.tasks import evaluate
from jobs.measures.result import Point
from jobs.measures.windows import Window, choose_windows, one_after_another, other_documents
from pipelines.workflow.errors import UserError

LOCAL = 16  # as the model of the fixtures

LENGTHS = {"books": [70, 200, 90], "code": [120, 40]}


@pytest.fixture(scope="module")
def subject(subject_of) -> Subject:
    return subject_of(LENGTHS)


def values(result) -> dict[tuple[str, int], float]:
    return {(point.metric, point.step): point.value for point in result.points}


def causal(model_dir: Path, tokens: np.ndarray, last: int) -> float:
    """Loss (nats) of the last `last` labels in one long pass: equal to reading windows, without positions."""
    model = FotLlamaForCausalLM.from_pretrained(model_dir).eval()
    text = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        log_probabilities = model(text[None, :-1], use_cache=False).logits[0, -last:].log_softmax(-1)
    return -log_probabilities.gather(1, text[-last:, None]).sum().item()


def test_the_last_window_is_scored_with_all_of_its_context(subject: Subject, model_dir: Path, measure) -> None:
    result = measure(module, subject, Perplexity(contexts=(3, 1), windows=9))
    dataset = open_documents(subject)
    windows = choose_windows(dataset, LOCAL, 3, 9)
    for context in (1, 3):
        spans = [(w.document, w.start - (context - 1) * LOCAL, w.start + LOCAL + 1) for w in windows]
        nats = sum(causal(model_dir, dataset.tokens(*span), LOCAL) for span in spans)
        expected = math.exp(nats / len(windows) / LOCAL)
        assert values(result)["perplexity/model", context * LOCAL] == pytest.approx(expected, rel=1e-5)
    assert "same 9 windows of 16 tokens at every length, of 4 held-out" in result.tables[0].note


def test_whole_documents_are_scored_from_their_first_token_on(subject: Subject, model_dir: Path, measure) -> None:
    result = measure(module, subject, Perplexity(contexts=(1, 4), windows=6, mode="whole_document"))
    dataset = open_documents(subject)
    documents = module.choose_documents(dataset, LOCAL, 4, "x")[:2]  # of 4 windows each
    for context in (1, 4):
        T = context * LOCAL
        nats = sum(causal(model_dir, dataset.tokens(document, 0, T + 1), T) for document in documents)
        found = values(result)["perplexity/model", T]
        assert found == pytest.approx(math.exp(nats / T / len(documents)), rel=1e-5)


@pytest.mark.parametrize("mode", ["last_window", "whole_document"])
def test_how_windows_are_batched_changes_nothing(subject: Subject, measure, monkeypatch, mode: str) -> None:
    settings = Perplexity(contexts=(1, 4), windows=12, mode=mode, others=(2,))
    whole = measure(module, subject, settings)
    cells = len(module.cells(subject, settings))
    monkeypatch.setattr(module, "TOKENS_A_CELL", 5 * LOCAL)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", LOCAL)
    assert len(module.cells(subject, settings)) > cells
    assert values(measure(module, subject, settings)) == pytest.approx(values(whole), rel=1e-6)


def test_a_rival_scores_the_same_windows_up_to_its_length(subject: Subject, measure, tmp_path: Path) -> None:
    """Without positions full attention is one causal pass, as reading into memory is."""
    settings = Perplexity(contexts=(1, 2, 4), windows=7)
    own = values(measure(module, subject, settings))
    windows = read_losses(tmp_path)
    rival = replace(subject, reading=Reading("full", up_to=2 * LOCAL))
    found = values(measure(module, rival, settings))
    assert {step for metric, step in found if metric == "perplexity/model"} == {LOCAL, 2 * LOCAL}
    assert found == pytest.approx({key: value for key, value in own.items() if key in found}, rel=1e-5)
    theirs = [one[:5] for one in read_losses(tmp_path)]
    assert theirs == [one[:5] for one in windows if one.step <= 2 * LOCAL]
    whole = Perplexity(contexts=(1, 2, 4), windows=6, mode="whole_document")
    own, found = (values(measure(module, each, whole)) for each in (subject, rival))
    assert found == pytest.approx({key: value for key, value in own.items() if key in found}, rel=1e-5)


def test_all_sources_are_the_token_weighted_mean_of_each(subject: Subject, measure) -> None:
    result = measure(module, subject, Perplexity(contexts=(1, 2), windows=12))
    found = values(result)
    windows = choose_windows(open_documents(subject), LOCAL, 2, 12)
    of_books = sum(window.document < 3 for window in windows)
    for tokens in (LOCAL, 2 * LOCAL):
        books, code = (math.log(found[f"perplexity/model/{source}", tokens]) for source in LENGTHS)
        mean = (of_books * books + (12 - of_books) * code) / 12
        assert math.log(found["perplexity/model", tokens]) == pytest.approx(mean)
    table = result.tables[1]
    assert [row[:3] for row in table.rows] == [
        ["books", "model", of_books * LOCAL],
        ["code", "model", (12 - of_books) * LOCAL],
    ]


def test_one_source_has_no_table_of_sources(subject_of, measure) -> None:
    result = measure(module, subject_of({"s": [70]}), Perplexity(contexts=(1,), windows=2))
    assert {metric for metric, _ in values(result)} == {"perplexity/model", "bits_per_byte/model"}
    assert len(result.tables) == 1
    assert result.plots == ["perplexity.png"]


def test_bits_a_byte_count_the_bytes_that_the_scored_tokens_spell(subject: Subject, measure) -> None:
    found = values(measure(module, subject, Perplexity(contexts=(1,), windows=5)))
    dataset, library = open_documents(subject), module.read_tokenizer(subject.model).tokenizer
    pieces = [
        library.id_to_token(int(token))  # a character a byte
        for w in choose_windows(dataset, LOCAL, 1, 5)
        for token in dataset.tokens(w.document, w.start + 1, w.start + LOCAL + 1)
    ]
    bits = math.log2(found["perplexity/model", LOCAL]) * len(pieces)
    assert found["bits_per_byte/model", LOCAL] == pytest.approx(bits / len("".join(pieces)))


def test_the_base_reads_with_the_models_memory_layers(subject: Subject, save_model, measure) -> None:
    base = save_model(mem_layers=[], initializer_range=0.3)
    models = {"model": subject.model, "base": base}
    result = measure(module, replace(subject, models=models), Perplexity(contexts=(1, 4), windows=4))
    found = values(result)
    assert found["perplexity/base", LOCAL] != pytest.approx(found["perplexity/base", 4 * LOCAL], rel=1e-6)
    assert found["perplexity/base", LOCAL] != pytest.approx(found["perplexity/model", LOCAL], rel=1e-6)
    assert result.tables[0].columns[1:3] == ["perplexity, base", "perplexity, model"]
    assert result.tables[0].rows[1][1] == found["perplexity/base", 4 * LOCAL]


def test_other_documents_are_read_before_the_own(subject: Subject, model_dir: Path, measure) -> None:
    result = measure(module, subject, Perplexity(contexts=(2,), windows=7, others=(3, 5)))
    dataset = open_documents(subject)
    for amount in (0, 3, 5):
        nats = 0.0
        windows = choose_windows(dataset, LOCAL, 2, 7)
        for own in windows:
            others = other_documents(dataset, own.document, LOCAL)
            assert own.document not in others
            drawn = one_after_another(dataset, others, LOCAL, f"0/others/{dataset.id(own.document)}")
            read = [dataset.tokens(w.document, w.start, w.start + LOCAL) for w in islice(drawn, amount)]
            text = np.concatenate([*read, dataset.tokens(own.document, own.start - LOCAL, own.start + LOCAL + 1)])
            nats += causal(model_dir, text, LOCAL)
        expected = math.exp(nats / len(windows) / LOCAL)
        assert values(result)["perplexity/model/distracted", amount * LOCAL] == pytest.approx(expected, rel=1e-5)
    found = values(result)
    assert found["perplexity/model/distracted", 0] == pytest.approx(found["perplexity/model", 2 * LOCAL])
    assert result.plots[-1] == "perplexity-distracted.png"


def test_more_others_than_there_are_is_a_users_error_that_says_how_many(subject: Subject) -> None:
    there = sum(size // LOCAL for size in (70, 90, 120, 40))  # beside the longest document
    settings = Perplexity(contexts=(1,), windows=20, others=(there + 1,))
    with pytest.raises(UserError, match=f"there are {there} of 16 tokens: lower it to at most {there},"):
        module.cells(subject, settings)
    module.cells(subject, settings.model_copy(update={"others": (there,)}))


def test_documents_of_another_tokenizer_are_a_users_error(subject: Subject, tmp_path: Path, save_model) -> None:
    from pipelines.tokens.tokenizer import train_tokenizer

    other = save_model()
    train_tokenizer(["quite other words in here"], 280, other)
    with pytest.raises(UserError, match="were tokenized otherwise"):
        module.cells(replace(subject, models={"model": other}), Perplexity())


def test_logits_are_made_of_the_scored_window_alone(subject: Subject) -> None:
    model = load_model(subject.model, subject.model)
    made = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: made.append(inputs[0].shape[1]))
    with torch.inference_mode():
        module.score_batch(subject, "model", module.ScoredRows(4, [Window(1, 3 * LOCAL)], 1))
    hook.remove()
    assert made == [1, 1, 1, LOCAL]


@pytest.mark.usefixtures("local_ray")
def test_it_is_measured_by_ray_tasks_and_written(subject: Subject, tmp_path: Path) -> None:
    result = evaluate("perplexity", subject, Perplexity(contexts=(1, 2), windows=4, others=(1,)), tmp_path)
    assert Point("perplexity/model", LOCAL, values(result)["perplexity/model", LOCAL]) in result.points
    assert all((tmp_path / plot).stat().st_size > 5000 for plot in result.plots)


def test_a_transformer_xl_is_scored_as_it_was_trained(subject: Subject, save_model, measure) -> None:
    shape = {"num_hidden_layers": 2, "mem_layers": []}
    plain, chained = (save_model(**shape, previous_context=on) for on in (False, True))
    settings = Perplexity(contexts=(1, 2, 4), windows=4)
    found = values(measure(module, replace(subject, models={"base": plain, "model": chained}), settings))
    alone = [found["perplexity/base", context * LOCAL] for context in (1, 2, 4)]
    linked = [found["perplexity/model", context * LOCAL] for context in (1, 2, 4)]
    assert linked[0] == pytest.approx(alone[0], rel=1e-5)  # the same weights
    assert len(set(alone)) == 1  # reading without memory layers sees the window alone
    assert len(set(linked)) == 3
    for wrong in (Perplexity(others=(1,)), Perplexity(mode="whole_document")):
        with pytest.raises(UserError, match="a Transformer-XL has no memory"):
            module.cells(replace(subject, models={"model": chained}), wrong)
