"""The form of the documents: what is asked was told, once, far before, and nowhere else."""

import hashlib
import re
from random import Random

import numpy as np
import pytest

from jobs.evaluate import passkey
from pipelines.sources.recall import LEAST_CHARACTERS, QUESTIONS, _facts, recall_document
from pipelines.sources.recall_carrier import carrier_text
from pipelines.sources.recall_facts import DIALOGUES, KINDS
from pipelines.sources.recall_names import Names
from pipelines.tokens.minhash import signature

FORMS = [form for kind in KINDS for form in (*kind.states, *kind.questions, *kind.answers, *kind.recalls)]


@pytest.fixture
def told(monkeypatch):
    """A document and the facts it holds."""
    kept = []

    def keep(draw, wanted):
        kept[:] = _facts(draw, wanted)
        return kept

    monkeypatch.setattr("pipelines.sources.recall._facts", keep)
    return lambda *arguments: (recall_document(*arguments), list(kept))


def test_a_document_is_the_same_everywhere():
    """Pinned: a change of the generator's text takes another VERSION."""
    made = [recall_document(seed, number, 6000) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in made] == [
        "dee823f4472cf8e3",
        "77d7772b3b330f6c",
        "06af71cd38297d7a",
    ]


@pytest.mark.parametrize("characters", [LEAST_CHARACTERS, 8000, 16_000, 32_000, 100_000])
def test_a_document_is_about_as_long_as_asked_for(characters):
    for number in range(10):
        assert characters - 1 <= len(recall_document(0, number, characters)) < characters + 1000


def test_too_short_a_document_is_refused():
    with pytest.raises(ValueError, match="at least 4000 characters, not 3999"):
        recall_document(0, 0, 3999)


@pytest.mark.parametrize(("characters", "number_of_facts"), [(4000, 20), (16_000, 50), (64_000, 60)])
def test_every_fact_is_told_and_asked_for_far_later_and_the_name_comes_first(told, characters, number_of_facts):
    distances, answers = [], 0
    for number in range(10):
        text, facts = told(2, number, characters)
        assert len(facts) == number_of_facts
        assert QUESTIONS[0] <= len(facts) <= QUESTIONS[1]
        for fact in facts:
            names = [found.start() for found in re.finditer(re.escape(fact.entity), text)]
            values = [found.start() for found in re.finditer(re.escape(fact.value), text)]
            assert len(names) >= 2, fact
            assert len(values) >= 2, fact
            assert values[-1] > names[0]
            distances.append((values[-1] - values[0]) / len(text))
            answers += (len(values) - 1) * len(fact.value)
    assert np.quantile(distances, 0.05) > 0.2
    assert np.median(distances) > 0.35
    assert answers / (10 * characters) > 0.01


def test_the_distance_is_as_set(told):
    for (least, most), low, high in (((0.6, 1.0), 0.5, 1.0), ((0.1, 0.2), 0.05, 0.3)):
        distances = []
        for number in range(10):
            text, facts = told(0, number, 16_000, (least, most))
            for fact in facts:
                if len(fact.value) >= 5 and text.count(fact.value) == 2:  # told once, asked for once
                    first, last = text.index(fact.value), text.rindex(fact.value)
                    distances.append((last - first) / len(text))
        assert low < np.quantile(distances, 0.05)
        assert np.quantile(distances, 0.95) < high


def test_no_fact_is_ambiguous_and_names_are_of_one_document(told):
    everywhere = []
    for number in range(40):
        _, facts = told(0, number, 16_000)
        asked = [(fact.kind, fact.attribute, fact.entity) for fact in facts]
        assert len(set(asked)) == len(facts)
        everywhere.append({fact.entity for fact in facts})
    every = [name for names in everywhere for name in names]
    assert len(set(every)) > 0.995 * len(every)


def test_several_facts_are_of_one_kind_and_some_of_one_name(told):
    kinds, shared = [], 0
    for number in range(40):
        _, facts = told(0, number, 16_000)
        kinds.append(len({fact.kind for fact in facts}))
        shared += len(facts) - len({fact.entity for fact in facts})
    assert max(kinds) <= 6
    assert shared > 100


def test_there_are_many_wordings():
    assert len({form for kind in KINDS for form in kind.states}) >= 60
    assert len({form for kind in KINDS for form in (*kind.questions, *kind.recalls)}) >= 60
    for kind in KINDS:
        assert len(kind.states) >= 4
        assert all("{e}" in form and "{v}" in form for form in kind.states)
        assert all("{e}" in form and "{v}" not in form and "?" in form for form in kind.questions)
        for form in kind.recalls:
            assert -1 < form.index("{e}") < form.index("{v}"), "before the name the value cannot be known"
        if len(kind.attributes) > 1:
            assert all("{a}" in form for form in (*kind.states, *kind.questions, *kind.recalls))


def test_attributes_are_of_one_kind():
    """A name with facts of two kinds would be asked for an attribute that has two values."""
    for entity in {kind.entity for kind in KINDS}:
        attributes = [each for kind in KINDS if kind.entity is entity for each in kind.attributes if each]
        assert len(set(attributes)) == len(attributes)


def test_the_carrier_has_many_styles_and_words():
    texts = [
        [sentence for sentence, _ in zip(carrier_text(Random(seed)), range(60), strict=False)] for seed in range(30)
    ]
    different = [len(set(sentences)) for sentences in texts]
    assert min(different) <= 6
    assert max(different) > 55
    assert len(set(re.findall(r"[a-z]+", " ".join(map(" ".join, texts)).lower()))) > 250


def test_documents_are_no_near_duplicates_of_one_another():
    signatures = np.stack([signature(recall_document(0, number, 8000)) for number in range(60)])
    alike = (signatures[:, None] == signatures[None]).mean(-1)
    np.fill_diagonal(alike, 0)
    assert alike.max() < 0.4


def test_the_passkey_evaluation_s_wording_stays_unseen():
    """No four words in a row of the prompts, and not the thing asked for."""
    prompt = " ".join((passkey.TASK, passkey.FILLER, passkey.KEY, passkey.QUESTION))
    seen = " \n ".join([*FORMS, *DIALOGUES, *(recall_document(0, number, 32_000) for number in range(20))])
    for word in ("pass key", "passkey", "pass-key", "grass", "memorize", "quiz you", "here we go", "there and back"):
        assert word not in seen.lower()
    assert not runs(prompt) & runs(seen)


def runs(text: str, length: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+|\{\w\}", text.lower())
    return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}


def test_made_up_words_begin_with_a_consonant_and_are_not_drawn_twice():
    names = Names(Random(0))
    made = [names.word() for _ in range(3000)]
    assert len(set(made)) == 3000
    assert not any(word[0] in "aeiou" for word in made)
