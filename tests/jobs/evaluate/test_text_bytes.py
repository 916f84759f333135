import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jobs.evaluate.text_bytes import prefix_bytes, token_bytes
from pipelines.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = ["The grass is green.  Two spaces, déjà vu; 漢字 and 😀.\n\tEnd </s> of\r\n text "] * 3
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level(directory: Path) -> None:
    train_tokenizer(TEXTS, 320, directory)


def llama_like(directory: Path) -> None:
    """A BPE with byte fallback, and a space before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXTS], trainer)  # else by bytes
    content = tokenizer.to_str()
    kept = Tokenizer.from_str(content)
    PreTrainedTokenizerFast(tokenizer_object=kept, unk_token="<unk>", **ENDS).save_pretrained(directory)
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    described["added_tokens"] = described["added_tokens"][:3]  # bytes are no special tokens
    file.write_text(json.dumps(described))


def unigram(directory: Path) -> None:
    """T5's kind: Metaspace, without byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **ENDS).save_pretrained(directory)


KINDS = {"byte-level": (byte_level, 0), "llama-like": (llama_like, 1)}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request, tmp_path_factory) -> tuple[TextTokenizer, int]:
    make, prefix = request.param
    directory = tmp_path_factory.mktemp("tokenizer")
    make(directory)
    return load_tokenizer(directory), prefix


def test_the_space_before_a_text_is_known(kind) -> None:
    tokenizer, prefix = kind
    assert prefix_bytes(tokenizer) == prefix


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=60))
def test_the_tokens_of_a_text_have_its_bytes(kind, text: str) -> None:
    tokenizer, prefix = kind
    (ids,) = tokenizer.encode_documents([text])
    assert token_bytes(tokenizer)[ids].sum() - prefix == len(text.encode())


def test_consecutive_windows_have_together_the_bytes_of_the_text_also_where_edges_cut_characters(kind) -> None:
    tokenizer, prefix = kind
    text = TEXTS[0] * 5 + "漢" * 50
    (ids,), sizes = tokenizer.encode_documents([text]), token_bytes(tokenizer)
    for length in (1, 2, 7):
        windows = [sizes[ids[start : start + length]].sum() for start in range(0, len(ids), length)]
        assert sum(windows) - prefix == len(text.encode())
    parts = sizes[ids[np.isin(ids, tokenizer.encode("漢" * 3))]]
    assert parts.min() >= 1
    assert parts.min() < 3, "a window's edge can lie within a character"


def test_special_tokens_stand_for_no_text(kind) -> None:
    tokenizer, _ = kind
    assert token_bytes(tokenizer)[[tokenizer.bos, tokenizer.eos]].tolist() == [0, 0]


def test_pieces_without_byte_fallback_are_counted_too(tmp_path: Path) -> None:
    unigram(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "The grass is green, isn't it"
    assert prefix_bytes(tokenizer) == 1
    assert token_bytes(tokenizer)[tokenizer.encode(text)].sum() - 1 == len(text)
