import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipelines.tokens.long_text import PIECE, encode_in_pieces, encode_texts

TEXTS = [
    "the cat sat on the mat, then the other cat sat there    and    there\n\n",
    "def f(x):\n    return  f'{x}'\n\t\t# 1234567 12 00 00 aaaaaaaa --------\n",
    "é café cafe\u0301 漢字 漢 😀 Привет ]]]] ==== ",
] * 30

fragments = st.one_of(
    st.sampled_from(
        ["the", "cat", " ", "\n", "<s>", "</s>", "<x>", "é", "e\u0301", "\u0301\u0323", "漢", "😀", "İ", "\r\n"]
    ),
    st.builds(lambda character, number: character * number, st.sampled_from(" a-\n0漢\u0301]="), st.integers(1, 90)),
    st.text("0123", min_size=1, max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
texts = st.lists(fragments, min_size=3, max_size=25).map("".join)


def trained(model, trainer, pre_tokenizer=None, normalizer=None, **options):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_level(pattern=None):
    """GPT-2's pre-tokenizer, or LLaMA 3's with the pattern."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizers.Sequence(steps))


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama():
    """A whole text is one word: Prepend, Replace, byte fallback, runs of spaces as pieces."""
    trainer = trainers.BpeTrainer(vocab_size=300, max_token_length=9, show_progress=False, special_tokens=["<unk>"])
    made = trained(models.BPE(unk_token="<unk>"), trainer, normalizer=llama_normalizer())
    definition = json.loads(made.to_str())
    vocabulary = definition["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = 1000 + byte
    definition["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.encode_special_tokens = True
    return tokenizer


def llama_normalizer():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def unigram(pre_tokenizer, normalizer=None):
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizer, normalizer)


MAKERS = {
    "byte-level BPE": byte_level,
    "byte-level BPE with digits by threes": lambda: byte_level(LLAMA3),
    "LLaMA": llama,
    "Unigram of words": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "Unigram of whole texts": lambda: unigram(None, llama_normalizer()),
}


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request):
    return MAKERS[request.param]()


@given(text=texts)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(any_tokenizer, text):
    whole = any_tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_in_pieces(any_tokenizer, text, piece=40, overlap=20, run=4).tolist() == whole
    assert encode_in_pieces(any_tokenizer, text, piece=97, overlap=30, run=6).tolist() == whole


def recording(tokenizer, lengths):
    """The tokenizer, which notes the length of each text that it encodes."""

    def encode(text, **options):
        lengths.append(len(text))
        return tokenizer.encode(text, **options)

    return SimpleNamespace(model=tokenizer.model, encode=encode)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Unigram of whole texts"])
def test_a_long_text_is_encoded_in_pieces_and_never_as_a_whole(name):
    tokenizer, text, lengths = MAKERS[name](), "".join(TEXTS), []
    ids = encode_in_pieces(recording(tokenizer, lengths), text, piece=300, overlap=100, run=8)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert max(lengths) <= 600 < len(text)
    assert sum(lengths) < 2 * len(text)


def test_where_pieces_never_agree_a_text_is_encoded_at_once_after_little_waste():
    tokenizer, lengths = llama(), []
    text = "漢" + "a" * 50_001
    ids = encode_in_pieces(recording(tokenizer, lengths), text, piece=301, overlap=50, run=8)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert sum(lengths) < 4 * len(text)


def test_short_and_long_texts_are_encoded_side_by_side():
    tokenizer = llama()
    long = "".join(TEXTS) * (PIECE // 2000)
    assert len(long) > 2 * PIECE
    whole = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("the cat", long, "", long[:PIECE])]
    assert [ids.tolist() for ids in encode_texts(tokenizer, ["the cat", long, "", long[:PIECE]])] == whole


@pytest.mark.slow
def test_a_document_of_100_megabytes_takes_less_than_a_gigabyte(tmp_path):
    llama().save(str(tmp_path / "tokenizer.json"))
    script = """
import random, resource
import numpy as np
from tokenizers import Tokenizer
from pipelines.tokens.long_text import encode_texts

tokenizer = Tokenizer.from_file("tokenizer.json")
random.seed(0)
line = " ".join(random.choices(["the", "cat", "sat", "on", "them", "all", "mat", "tea"], k=3000)) + "\\r"
once, twice = (tokenizer.encode(line * number, add_special_tokens=False).ids for number in (1, 2))
assert twice[: len(once)] == once, "no token reaches over a line's end"
repeats = 100_000_000 // len(line)
(ids,) = encode_texts(tokenizer, [line * repeats])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert np.array_equal(ids, np.concatenate([once, np.tile(twice[len(once) :], repeats - 1)]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000  # kilobytes
