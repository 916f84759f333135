import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.tokenizer import import_tokenizer, load_tokenizer, train_tokenizer

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
special_text = st.lists(
    st.one_of(st.sampled_from(["<s>", "</s>", "<s", "s>", "<", ">", "/", " ", "\n", "the cat"]), unicode_text)
).map("".join)


@given(special_text)
def test_encoding_and_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(special_text)
def test_text_never_becomes_a_special_token(tokenizer, text):
    assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.encode(text))
    (tokens,) = tokenizer.encode_documents([text])
    assert tokens == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


@given(st.lists(special_text, max_size=8))
def test_a_text_is_encoded_the_same_in_any_company(tokenizer, texts):
    assert tokenizer.encode_documents(texts) == [tokenizer.encode_documents([text])[0] for text in texts]


def test_a_long_text_is_not_cut_nor_a_short_one_filled(tokenizer):
    long, short = tokenizer.encode_documents(["the cat " * 100_000, "the"])
    assert tokenizer.tokenizer.decode(long[1:-1]) == "the cat " * 100_000
    assert len(short) <= 5


def test_bos_and_eos_are_the_named_tokens(tokenizer):
    assert tokenizer.tokenizer.id_to_token(tokenizer.bos) == "<s>"
    assert tokenizer.tokenizer.id_to_token(tokenizer.eos) == "</s>"


def test_training_learns_at_most_the_vocabulary_asked_for(tokenizer):
    assert 258 < tokenizer.vocab_size <= 320
    assert max(tokenizer.encode("the cat sat on the mat é 漢字")) < tokenizer.vocab_size
    assert len(tokenizer.encode("the cat")) < len("the cat")


def test_training_on_the_same_texts_gives_the_same_bytes(fresh, contents):
    texts = [f"{number * 7919 % 1000} words and {number % 13} more" for number in range(500)]
    first, second = fresh(), fresh()
    for directory in (first, second):
        train_tokenizer(iter(texts), 400, directory)
    assert contents(first) == contents(second)


def test_the_fingerprint_tells_tokenizers_apart(tokenizer, tokenizer_directory, fresh):
    assert load_tokenizer(tokenizer_directory).fingerprint == tokenizer.fingerprint
    other = fresh()
    train_tokenizer(["other words entirely"] * 10, 300, other)
    assert load_tokenizer(other).fingerprint != tokenizer.fingerprint


def test_the_fingerprint_knows_which_token_ends_a_document(tokenizer, tokenizer_directory, fresh):
    changed = fresh() / "changed"
    shutil.copytree(tokenizer_directory, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<s>"}))
    assert load_tokenizer(changed).fingerprint != tokenizer.fingerprint


@given(special_text)
def test_an_imported_tokenizer_encodes_as_the_original(tokenizer, imported, text):
    assert imported.encode_documents([text]) == tokenizer.encode_documents([text])


@pytest.fixture(scope="module")
def imported(tokenizer_directory, fresh):
    directory = fresh()
    import_tokenizer(str(tokenizer_directory), directory)
    return load_tokenizer(directory)


def test_a_directory_without_a_tokenizer_is_a_mistake(tmp_path, fresh):
    with pytest.raises(UserError, match=r"no tokenizer in .*: set tokenizer\.path"):
        import_tokenizer(str(tmp_path), fresh())
    with pytest.raises(UserError, match=r"no tokenizer in .*: set tokenizer\.path"):
        import_tokenizer(str(tmp_path / "missing"), fresh())


def test_a_tokenizer_without_eos_is_a_mistake(tokenizer_directory, tmp_path, fresh):
    shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({key: v for key, v in json.loads(config.read_text()).items() if key != "eos_token"}))
    with pytest.raises(UserError, match="has no eos_token"):
        import_tokenizer(str(tmp_path / "tokenizer"), fresh())
