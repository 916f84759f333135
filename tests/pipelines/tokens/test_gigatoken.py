import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipelines.tokens.gigatoken_check import why_not
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.errors import UserError

texts = st.lists(
    st.one_of(
        st.sampled_from(["<s>", "</s>", "<s", "s>", " ", "   ", "\n", "the cat", "é", "漢字", "1234", "don't"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    )
).map("".join)


@pytest.fixture(scope="module")
def fast(tokenizer_directory):
    return load_tokenizer(tokenizer_directory, "gigatoken")


@given(st.lists(texts, max_size=6))
def test_gigatoken_makes_the_same_documents(tokenizer, fast, documents):
    for ours, theirs in zip(tokenizer.encode_documents(documents), fast.encode_documents(documents), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@given(texts)
def test_text_never_becomes_a_special_token_with_gigatoken(fast, text):
    assert not {fast.bos, fast.eos} & set(fast.encode(text))


def test_the_backend_is_no_part_of_a_tokenizers_identity(tokenizer, fast):
    assert (fast.fingerprint, fast.behaviour) == (tokenizer.fingerprint, tokenizer.behaviour)


def test_nothing_speaks_against_gigatoken_where_it_makes_the_same_tokens(tokenizer_directory):
    assert why_not(tokenizer_directory, ["the cat <s> sat", "  \n\n on 1234 mats</s>"]) is None


def test_gigatoken_is_refused_for_a_kind_of_tokenizer_that_it_does_not_know(tokenizer_directory, fresh):
    directory = copy_with(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), tokenizer_directory, fresh())
    reason = why_not(directory, ["the cat"])
    assert reason.startswith("gigatoken cannot load the tokenizer: Unsupported model type")
    assert "\n" not in reason
    with pytest.raises(UserError, match="Unsupported model type"):
        load_tokenizer(directory, "gigatoken")


def test_gigatoken_is_refused_where_it_makes_other_tokens_of_a_text_of_the_sample(tokenizer_directory, fresh):
    across_words = Tokenizer(models.BPE())
    across_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    across_words.train_from_iterator(["zqj xvz"] * 50, trainer)
    directory = copy_with(across_words, tokenizer_directory, fresh())
    assert why_not(directory, ["the cat"]) is None
    reason = why_not(directory, ["the cat", "a zqj xvz"])
    assert reason == "gigatoken makes other tokens of the text that begins 'a zqj xvz'"


def copy_with(tokenizer, directory, other):
    if tokenizer.token_to_id("<s>") is None:
        tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(other / "tokenizer.json"))
    (other / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    return other


def test_encoding_starts_no_threads(fast):
    before = threading.active_count()
    fast.encode_documents(["the cat sat on the mat " * 1000] * 50)
    assert threading.active_count() == before


def test_without_gigatoken_the_mistake_names_the_extra(tokenizer_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    for ask in (lambda: load_tokenizer(tokenizer_directory, "gigatoken"), lambda: why_not(tokenizer_directory, [])):
        with pytest.raises(UserError, match=r"pip install 'fot\[gigatoken\]'"):
            ask()
