import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from pipelines.tokens.tokenizer import has_tokenizer, import_tokenizer, load_tokenizer, read_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError

hostile_text = st.lists(
    st.one_of(
        st.sampled_from(["<s>", "</s>", "<unk>", "<s", "s>", "<", ">", " ", "\n", "the cat", "<0x0A>", "[word]", "▁"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    )
).map("".join)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
special_text = st.lists(
    st.one_of(st.sampled_from(["<s>", "</s>", "<s", "s>", "<", ">", "/", " ", "\n", "the cat"]), unicode_text)
).map("".join)


@pytest.fixture(scope="module")
def sentencepiece_model(fresh):
    """A model as LLaMA's: BPE, bytes for what it does not know, white space as it is."""
    path = fresh() / "small.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["<s>the cat</s> sat on the   mat <s> </s> [word] é 漢字"] * 50),
            model_writer=file,
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="module")
def llama_directory(sentencepiece_model, fresh):
    directory = fresh()
    import_tokenizer(str(sentencepiece_model), directory)
    return directory


@pytest.fixture(scope="module")
def imported_llama(llama_directory):
    return load_tokenizer(llama_directory)


def save(tokenizer, directory):
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def unigram(fresh):
    """Its special tokens are pieces of the model, as in every Unigram one, and better than any other."""
    pieces = ["▁", "<", ">", "/", "s", "u", "n", "k", "the", "cat"]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return save(tokenizer, fresh())


@pytest.fixture(scope="module")
def word_level(fresh):
    """Words are looked up whole, special ones as well."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return save(tokenizer, fresh())


@pytest.fixture(scope="module", params=["tokenizer", "imported_llama", "unigram", "word_level"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@given(special_text)
def test_encoding_and_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(special_text)
def test_text_never_becomes_a_special_token(tokenizer, text):
    assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.encode(text))
    (tokens,) = tokenizer.encode_documents([text])
    assert tokens.tolist() == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


@given(st.lists(special_text, max_size=8))
def test_a_text_is_encoded_the_same_in_any_company(tokenizer, texts):
    together = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in together] == [tokenizer.encode_documents([text])[0].tolist() for text in texts]


def test_a_long_text_is_not_cut_nor_a_short_one_filled(tokenizer):
    long, short = tokenizer.encode_documents(["the cat " * 100_000, "the"])
    assert tokenizer.tokenizer.decode(long[1:-1]) == "the cat " * 100_000
    assert len(short) <= 5


def test_a_text_of_nothing_becomes_bos_and_eos_alone(tokenizer):
    (tokens,) = tokenizer.encode_documents([""])
    assert tokens.tolist() == [tokenizer.bos, tokenizer.eos]


def test_documents_come_in_the_type_that_shards_hold(tokenizer, fresh):
    assert tokenizer.encode_documents(["the cat"])[0].dtype == np.uint16
    definition = json.loads(tokenizer.tokenizer.to_str())
    definition["model"]["vocab"]["Ġzebra"] = 70_000
    large = fresh()
    (large / "tokenizer.json").write_text(json.dumps(definition))
    (large / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    assert load_tokenizer(large).vocab_size == 70_001
    assert load_tokenizer(large).encode_documents(["the cat"])[0].dtype == np.uint32


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


def test_the_behaviour_is_what_the_library_makes_of_a_tokenizer(tokenizer, tokenizer_directory):
    again = load_tokenizer(tokenizer_directory)
    assert again.behaviour == tokenizer.behaviour
    again.tokenizer.normalizer = normalizers.NFC()  # as if the library had begun to normalise
    del again.__dict__["behaviour"]
    assert again.behaviour != tokenizer.behaviour


@given(special_text)
def test_an_imported_tokenizer_encodes_as_the_original(tokenizer, imported, text):
    assert imported.encode(text) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def imported(tokenizer_directory, fresh):
    directory = fresh()
    import_tokenizer(str(tokenizer_directory), directory)
    return load_tokenizer(directory)


def test_an_imported_tokenizer_is_what_transformers_opens(imported_llama, llama_directory):
    configuration = json.loads((llama_directory / "tokenizer_config.json").read_text())
    assert configuration["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that older versions know, too
    opened = AutoTokenizer.from_pretrained(llama_directory)
    for text in ["  two spaces", "the cat\n sat", "é 漢字 😀", ""]:
        assert opened.encode(text, add_special_tokens=False) == imported_llama.encode(text)
        assert opened.decode(imported_llama.encode(text)) == text
    assert (opened.bos_token_id, opened.eos_token_id) == (imported_llama.bos, imported_llama.eos)


def test_a_tokenizer_json_is_taken_as_it_stands_whatever_class_its_configuration_names(llama_directory, fresh):
    named, directory = fresh(), fresh()
    shutil.copy(llama_directory / "tokenizer.json", named)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    import_tokenizer(str(named), directory)
    assert load_tokenizer(directory).fingerprint == load_tokenizer(llama_directory).fingerprint


def test_a_directory_with_a_sentencepiece_model_alone_is_imported(sentencepiece_model, llama_directory, fresh):
    origin, directory = fresh(), fresh()
    shutil.copy(sentencepiece_model, origin / "tokenizer.model")
    import_tokenizer(str(origin), directory)
    assert load_tokenizer(directory).fingerprint == load_tokenizer(llama_directory).fingerprint
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": {"content": "cat"}}
    (origin / "tokenizer_config.json").write_text(json.dumps(config))
    import_tokenizer(str(origin), directory)
    assert load_tokenizer(directory).tokenizer.id_to_token(load_tokenizer(directory).eos) == "cat"


def test_importing_what_was_made_here_changes_no_byte(tokenizer_directory, llama_directory, fresh, contents):
    for made in (tokenizer_directory, llama_directory):
        again = fresh()
        import_tokenizer(str(made), again)
        assert contents(again) == contents(made)


def test_importing_twice_gives_the_same_bytes(sentencepiece_model, llama_directory, fresh, contents):
    again = fresh()
    import_tokenizer(str(sentencepiece_model), again)
    assert contents(again) == contents(llama_directory)


@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("b" * 40, "b" * 40)])
def test_a_hub_repository_is_taken_from_the_cache(
    llama_directory, tokenizer_directory, fresh, contents, revision, commit
):
    home, directory = fresh(), fresh()
    repository = home / "hub" / "models--organisation--name"
    shutil.copytree(llama_directory, repository / "snapshots" / ("a" * 40))
    shutil.copytree(tokenizer_directory, repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IMPORT, "organisation/name", directory, revision or ""]
    subprocess.run(command, env=environment, check=True)
    expected = fresh()
    import_tokenizer(str(repository / "snapshots" / commit), expected)
    assert contents(directory) == contents(expected)


IMPORT = """
import sys
from pathlib import Path
from pipelines.workflow.errors import UserError
from pipelines.tokens.tokenizer import import_tokenizer

try:
    import_tokenizer(sys.argv[1], Path(sys.argv[2]), sys.argv[3] or None)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("name", ["organisation/name", "organisation/other name", "/nowhere/at/all"])
def test_a_hub_repository_that_is_not_there_is_a_mistake(name, fresh):
    environment = os.environ | {"HF_HOME": str(fresh()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IMPORT, name, fresh(), ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"no tokenizer in {name}: set tokenizer.path" in done.stderr


@given(text=hostile_text)
def test_no_special_string_in_a_text_becomes_a_special_token(any_tokenizer, text):
    special = {number for number, token in any_tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}
    special -= {any_tokenizer.tokenizer.token_to_id("<unk>")}  # what a model has no piece for
    assert {any_tokenizer.bos, any_tokenizer.eos} <= special
    assert not special & set(any_tokenizer.encode(text))


@given(text=hostile_text)
def test_an_unknown_token_stands_for_characters_of_which_the_model_knows_none(any_tokenizer, text):
    encoding = any_tokenizer.tokenizer.encode(text, add_special_tokens=False)
    assert "<unk>" not in [
        text[start:end]
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if number == any_tokenizer.tokenizer.token_to_id("<unk>")
    ]


def test_an_added_token_that_is_not_special_is_ordinary_vocabulary(any_tokenizer):
    tokenizer = any_tokenizer.tokenizer
    if tokenizer.token_to_id("[word]") is None:
        tokenizer.add_tokens(["[word]"])
    assert tokenizer.token_to_id("[word]") in any_tokenizer.encode("the [word] </s>")


def test_bos_is_special_even_where_its_definition_forgot_to_say_so(tokenizer_directory, fresh):
    definition = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    directory = fresh()
    shutil.copy(tokenizer_directory / "tokenizer_config.json", directory)
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(directory)
    assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.encode("a <s> b </s>"))


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


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ADDED = ["<pad>", "<|im_start|>", "<|im_end|>"]
NAMED = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>"}
FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
PLACES = ("added_tokens_decoder", "added_tokens.json", "special_tokens_map.json")


def write_added(directory, first, places, numbers=None):
    """ChatML's tokens behind a vocabulary of `first`, said in some of the places where a tokenizer's files say it."""
    numbers = numbers or range(first, first + len(ADDED))
    config = {"tokenizer_class": "LlamaTokenizer", **NAMED}
    if "added_tokens_decoder" in places:
        named = zip(numbers, ADDED, strict=True)
        config["added_tokens_decoder"] = {str(number): {"content": token, **FLAGS} for number, token in named}
    if "added_tokens.json" in places:
        (directory / "added_tokens.json").write_text(json.dumps(dict(zip(ADDED, numbers, strict=True))))
    if "special_tokens_map.json" in places:
        (directory / "special_tokens_map.json").write_text(json.dumps(NAMED))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("places", [PLACES, PLACES[:1], PLACES[:2], PLACES[1:]], ids=str)
def test_tokens_added_to_a_sentencepiece_model_keep_their_numbers(sentencepiece_model, llama_directory, fresh, places):
    origin, directory = fresh(), fresh()
    size = load_tokenizer(llama_directory).vocab_size
    shutil.copy(sentencepiece_model, origin / "tokenizer.model")
    write_added(origin, size, places)
    import_tokenizer(str(origin), directory)
    opened, made = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert opened.convert_tokens_to_ids(ADDED) == [size, size + 1, size + 2]
    assert {name: getattr(opened, name) for name in NAMED} == NAMED
    assert len(opened) == made.vocab_size == size + 3
    assert (made.bos, made.eos) == (opened.bos_token_id, size + 2)
    text = "the cat <|im_start|> sat <pad>"
    assert made.encode("the cat") == load_tokenizer(llama_directory).encode("the cat")
    assert max(made.in_documents.values()) == size + 2  # it ends with one of them
    ordinary = "added_tokens_decoder" not in places  # nothing says that <|im_start|> is special
    assert {size, size + 1, size + 2} & set(made.encode(text)) == ({size + 1} if ordinary else set())
    assert {"<pad>", "<|im_start|>"} & made.in_documents.keys() == ({"<|im_start|>"} if ordinary else set())


@pytest.mark.parametrize("place", PLACES[:2])
def test_added_tokens_whose_numbers_cannot_be_kept_are_a_mistake(sentencepiece_model, llama_directory, fresh, place):
    origin = fresh()
    size = load_tokenizer(llama_directory).vocab_size
    shutil.copy(sentencepiece_model, origin / "tokenizer.model")
    write_added(origin, size, [place], [size + 7, size + 8, size + 9])
    with pytest.raises(UserError, match=rf"says that token {size + 7} is '<pad>', and makes it {size}: bring its"):
        import_tokenizer(str(origin), fresh())


def test_a_tokenizer_json_that_other_files_contradict_is_a_mistake(tokenizer_directory, fresh):
    origin = fresh()
    shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    (origin / "added_tokens.json").write_text(json.dumps({"<pad>": 7}))
    with pytest.raises(UserError, match="says that token 7 is '<pad>', and makes it "):
        import_tokenizer(str(origin), fresh())


TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("kind", ["tokenizer", "llama"])
@pytest.mark.parametrize("place", ["config", "jinja", "several", "directory"])
def test_the_chat_template_comes_with_the_tokenizer_wherever_it_stands(
    tokenizer_directory, sentencepiece_model, fresh, contents, kind, place
):
    origin, directory, again = fresh(), fresh(), fresh()
    if kind == "tokenizer":
        shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    else:
        shutil.copy(sentencepiece_model, origin / "tokenizer.model")
        (origin / "tokenizer_config.json").write_text("{}")
    expected = TEMPLATE if place in ("config", "jinja") else {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    if place in ("config", "several"):
        named = (
            [{"name": name, "template": template} for name, template in expected.items()]
            if place == "several"
            else None
        )
        edit(origin / "tokenizer_config.json", chat_template=named or TEMPLATE)
    else:
        (origin / "chat_template.jinja").write_text(TEMPLATE)
    if place == "directory":
        (origin / "additional_chat_templates").mkdir()
        (origin / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    import_tokenizer(str(origin), directory)
    assert {file.suffix for file in directory.iterdir()} == {".json"}
    assert AutoTokenizer.from_pretrained(directory).chat_template == expected
    import_tokenizer(str(directory), again)
    assert contents(again) == contents(directory)


def test_the_settings_of_a_tokenizer_come_with_it(tokenizer_directory, fresh):
    origin, directory = fresh(), fresh()
    shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    said = {"model_max_length": 77, "padding_side": "left", "pad_token": "<pad>", "clean_up_tokenization_spaces": True}
    auto_map = {"AutoTokenizer": ["tokenization_own.Own", None]}
    edit(origin / "tokenizer_config.json", **said, add_bos_token=True, add_eos_token=True, auto_map=auto_map)
    import_tokenizer(str(origin), directory)
    opened = AutoTokenizer.from_pretrained(directory)
    assert {name: getattr(opened, name) for name in said} == said
    assert opened.encode("the cat") == AutoTokenizer.from_pretrained(origin).encode("the cat")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_what_stands_around_a_text_is_what_a_sentencepiece_models_configuration_says(
    sentencepiece_model, fresh, bos, eos
):
    origin, directory = fresh(), fresh()
    shutil.copy(sentencepiece_model, origin / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", **NAMED, "eos_token": "</s>", "pad_token": "</s>"}
    (origin / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": bos, "add_eos_token": eos}))
    import_tokenizer(str(origin), directory)
    opened = AutoTokenizer.from_pretrained(directory)
    ids = opened.encode("the cat")
    assert (ids[0] == opened.bos_token_id, ids[-1] == opened.eos_token_id) == (bos, eos)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_an_empty_name_is_no_token(tokenizer_directory, fresh, name):
    origin = fresh()
    shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    edit(origin / "tokenizer_config.json", **{name: ""})
    with pytest.raises(UserError, match=f"has no {name}: add it"):
        import_tokenizer(str(origin), fresh())


DAMAGES = {
    "a later kind": lambda path: edit(path / "tokenizer.json", pre_tokenizer={"type": "OfALaterVersion"}),
    "cut off": lambda path: (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text()[:-9]),
    "no vocabulary": lambda path: (path / "tokenizer.json").write_text("{}"),
    "no configuration": lambda path: (path / "tokenizer_config.json").write_text("{"),
    "a list": lambda path: (path / "tokenizer_config.json").write_text("[]"),
    "a number for a token": lambda path: edit(path / "tokenizer_config.json", bos_token=7),
    "added tokens": lambda path: (path / "added_tokens.json").write_text("["),
}


@pytest.mark.parametrize("trained_here", [True, False])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_tokenizer_that_cannot_be_read_is_one_line(tokenizer_directory, fresh, damage, trained_here):
    origin = fresh()
    shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    if not trained_here:
        edit(origin / "tokenizer_config.json", pad_token="<pad>")
    damage(origin)
    with pytest.raises(
        UserError, match=r"^the tokenizer in \S+ cannot be read \(.*\): download or copy it again"
    ) as caught:
        import_tokenizer(str(origin), fresh())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_what_git_lfs_did_not_fetch_is_named(tokenizer_directory, fresh, name):
    origin = fresh()
    if name != "tokenizer.model":
        shutil.copytree(tokenizer_directory, origin, dirs_exist_ok=True)
    (origin / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer, not the file itself: run"):
        import_tokenizer(str(origin), fresh())


def test_a_tokenizer_is_read_where_it_lies(tokenizer_directory, sentencepiece_model, fresh):
    assert read_tokenizer(str(tokenizer_directory)).fingerprint == load_tokenizer(tokenizer_directory).fingerprint
    alone = fresh()
    assert not has_tokenizer(alone)
    shutil.copy(sentencepiece_model, alone / "tokenizer.model")
    assert has_tokenizer(alone)
    assert has_tokenizer(tokenizer_directory)


@given(text=hostile_text)
def test_a_document_holds_no_other_tokens_than_it_may(any_tokenizer, text):
    (tokens,) = any_tokenizer.encode_documents([text])
    assert {*tokens.tolist()} <= {*any_tokenizer.in_documents.values()}
