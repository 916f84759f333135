import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import models

from pipelines.tokens.sentencepiece_model import convert
from pipelines.tokens.tokenizer import import_tokenizer, load_tokenizer
from pipelines.workflow.errors import UserError

LINES = [
    "the cat sat on the mat",
    "a<sb<sc<sd</se</sf</s >",
    "def f(self):    return  x == y",
    "café cafe\u0301 漢字 ﬁne Å [X] 12",
] * 40

AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS = {
    "LLaMA": {
        "model_type": "bpe",
        "allow_whitespace_only_pieces": True,
        "split_by_unicode_script": False,  # "<s" becomes a piece
        **AS_IT_IS,
    },
    "BPE of words": {"model_type": "bpe", **AS_IT_IS},
    "BPE that normalises": {"model_type": "bpe", "character_coverage": 0.98, "vocab_size": 100},
    "BPE without prefix": {"model_type": "bpe", "add_dummy_prefix": False, **AS_IT_IS},
    "BPE with symbols": {"model_type": "bpe", "user_defined_symbols": ["[X]", "[X]]"], **AS_IT_IS},
    "Unigram": {"model_type": "unigram", "hard_vocab_limit": False},
    "Unigram with bytes": {"model_type": "unigram", "hard_vocab_limit": False, **AS_IT_IS},
    "Unigram across words": {
        "model_type": "unigram",
        "hard_vocab_limit": False,
        "split_by_whitespace": False,
        **AS_IT_IS,
    },
}

texts = st.lists(
    st.one_of(
        st.sampled_from(
            ["<s>", "</s>", "[X]", "▁", " ", "   ", "\n", "the", "cat", "==", "<0x0A>", "ﬁ", "e\u0301", "漢"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def both(request, fresh):
    """(sentencepiece's own reader of a model, the model converted and loaded as a tokenizer)."""
    path, model, directory = fresh() / "a.model", io.BytesIO(), fresh()
    settings = {"vocab_size": 330, "minloglevel": 2, **KINDS[request.param]}
    SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    import_tokenizer(str(path), directory)
    return SentencePieceProcessor(model_file=str(path)), load_tokenizer(directory).tokenizer


def score(processor, ids):
    return sum(processor.get_score(number) for number in ids)


@given(text=texts)
def test_a_converted_model_encodes_as_sentencepiece_does(both, text):
    processor, tokenizer = both
    theirs, ours = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
    unigram = isinstance(tokenizer.model, models.Unigram)
    looks_words_up = unigram or tokenizer.model.ignore_merges
    if looks_words_up and any(special in text for special in ("<unk>", "<s>", "</s>")):
        assert not {processor.bos_id(), processor.eos_id()} & set(ours)  # cut after the first character
    elif unigram and ours != theirs:  # several best segmentations
        assert score(processor, ours) == pytest.approx(score(processor, theirs), abs=1e-4)
    else:
        assert ours == theirs


@pytest.mark.parametrize("text", ["the cat sat on the mat", "def f(self): return x == y"])
def test_a_converted_model_decodes_as_sentencepiece_does(both, text):
    processor, tokenizer = both
    assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text)) == text


def test_the_model_names_its_special_tokens(both):
    processor, tokenizer = both
    assert tokenizer.token_to_id("<s>") == processor.bos_id()
    assert tokenizer.encode("the").ids[0] == processor.bos_id()


def test_a_model_without_bos_names_none(tmp_path):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=100, bos_id=-1, model_type="bpe", minloglevel=2
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    _, names = convert(tmp_path / "a.model")
    assert names == {"eos_token": "</s>", "unk_token": "<unk>"}


def test_models_of_other_kinds_and_other_files_are_mistakes(tmp_path):
    (tmp_path / "words.model").write_text("no protocol buffer at all")
    with pytest.raises(UserError, match="is no SentencePiece model"):
        convert(tmp_path / "words.model")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=20, model_type="word", minloglevel=2
    )
    (tmp_path / "words.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="give a BPE or a Unigram model"):
        convert(tmp_path / "words.model")


def test_without_sentencepiece_the_mistake_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'fot\[sentencepiece\]'"):
        convert(tmp_path / "a.model")
