"""Tokenizers as directories of `tokenizer.json` and `tokenizer_config.json`, as Hugging Face lays them out.

Trained here (byte-level BPE), or brought from a checkpoint, a SentencePiece model or the hub: whole, with the tokens
added to it under the numbers they have there, and its chat template (in `tokenizer_config.json`, wherever it stood).
Text never becomes a special token: a literal `</s>` in a document is tokenized as the characters it is made of.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.tokens import sentencepiece_model
from pipelines.tokens.gigatoken import make_encoder
from pipelines.tokens.long_text import encode_texts
from pipelines.tokens.shards import token_dtype
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import check_fetched
from pipelines.workflow.hashing import hash_json

BOS, EOS = "<s>", "</s>"
JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
TRAINED_HERE = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}  # the config then
MODEL = "tokenizer.model"  # SentencePiece's
# What belongs to a tokenizer beside its vocabulary and its configuration.
BESIDE = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"  # a directory, where there are several
HUB_FILES = ["tokenizer*", *BESIDE, f"{TEMPLATES}/*", "vocab.json", "merges.txt"]

PROBES = (
    "",
    "The quick brown fox can't jump, they'll say; IT'S over-rated (1852-1915)!",
    " one space before, two  and three   within, one behind ",
    "\n\n\tdef f(x: int) -> str:\r\n        return f'{x:>8}'  # 4 and 8\u00a0spaces\u2003\u200b\n",
    "0 7 42 1000000 3.14159 1e-05 ٣٤ ½ Ⅷ x²",
    "<s> </s> <unk> <pad> <0x0A> <|endoftext|> [CLS] [INST] ▁ Ġ",
    "caf\u00e9 cafe\u0301 \ufb01n \u212b \uff21 n\u0303\u0323 \u0e01\u0e33 straße İi",
    "😀 👩🏽‍🚀 🇩🇪 ❤️ ☂",
    "漢字とカタカナ、한국어. 中文没有空格",
    "السَّلامُ عليكم، शुभ प्रभात, Привет, γλώσσα",
    r"$\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}$ ∀ε>0 ∃δ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ---------------- \x00\x7f\ufeff\ufffd",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for documents: text in, token ids out, bos and eos around.

    `encoder` makes ids of texts: the library's, or another with the same result.
    """

    tokenizer: Tokenizer
    bos: int
    eos: int
    encoder: Callable[[list[str]], list[np.ndarray]]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @cached_property
    def in_documents(self) -> dict[str, int]:
        """The tokens that a document may hold. Of those added as special, which no text becomes, bos and eos alone."""
        added = self.tokenizer.get_added_tokens_decoder()
        ordinary = {token.content: number for number, token in added.items() if not token.special}
        ends = {token.content: number for number, token in added.items() if number in (self.bos, self.eos)}
        return self.tokenizer.get_vocab(with_added_tokens=False) | ordinary | ends

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's own definition: everything that decides which tokens a text becomes."""
        return hash_json([json.loads(self.tokenizer.to_str()), self.bos, self.eos])

    @cached_property
    def behaviour(self) -> str:
        """Hash of what the library makes of the tokenizer: the tokens of texts chosen to tell its versions apart."""
        return hash_json([ids.tolist() for ids in encode_texts(self.tokenizer, list(PROBES))])

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text between bos and eos, in the type that shards hold. No text, no tokens: [bos, eos]."""
        dtype = token_dtype(self.vocab_size)
        bos, eos = np.array([self.bos], dtype), np.array([self.eos], dtype)
        return [np.concatenate([bos, ids.astype(dtype), eos]) for ids in self.encoder(texts)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without bos and eos."""
        return list(self.encoder([text])[0].tolist())


def load_tokenizer(directory: Path, backend: str = "huggingface") -> TextTokenizer:
    """A tokenizer directory written by this module.

    Raises UserError for the backend "gigatoken" where it is not installed.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    ends = [_content(config[name]) for name in ("bos_token", "eos_token")]
    _neutralise_special_strings(tokenizer, ends)
    bos, eos = (tokenizer.get_vocab()[end] for end in ends)
    if backend == "huggingface":
        return TextTokenizer(tokenizer, bos, eos, lambda texts: encode_texts(tokenizer, texts))

    return TextTokenizer(tokenizer, bos, eos, make_encoder(tokenizer))


def _content(token: str | dict[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _neutralise_special_strings(tokenizer: Tokenizer, ends: list[str]) -> None:
    """Have special tokens' strings in a text, bos and eos among them, tokenized as ordinary characters.

    The library does so with `encode_special_tokens`, but some models (all Unigram ones) have the strings among their
    own pieces: there a word ends after the first character of such a string. Added tokens that are not special are
    ordinary vocabulary.
    """
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True) for end in ends])
    tokenizer.encode_special_tokens = True
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    made = {string: {piece.value for piece in tokenizer.model.tokenize(string)} for string in sorted(special)}
    if pieces := [string for string, values in made.items() if string in values]:
        first = "|".join(f"{re.escape(string[0])}(?={re.escape(string[1:])})" for string in pieces)
        apart = pre_tokenizers.Split(Regex(first), behavior="merged_with_previous")
        before = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, apart]) if before else apart


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on the texts and write it to the directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / JSON))
    (directory / CONFIG).write_text(json.dumps(TRAINED_HERE, indent=1))


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds its tokenizer, too."""
    return any((directory / name).exists() for name in (JSON, MODEL))


def read_tokenizer(path: str) -> TextTokenizer:
    """A tokenizer that is to be used where it lies. Raises UserError as `import_tokenizer` does."""
    with TemporaryDirectory() as directory:
        import_tokenizer(path, Path(directory))
        return load_tokenizer(Path(directory))


def import_tokenizer(path: str, directory: Path, revision: str | None = None) -> None:
    """Bring a tokenizer into the directory: a Hugging Face tokenizer directory, a SentencePiece model file, or a hub id
    (`organisation/name`, at a `revision`).

    A `tokenizer.json` is taken as it stands, and what was trained or brought in here gives the same bytes again. Raises
    UserError where there is no tokenizer, where it cannot be read or does not give its added tokens the numbers that it
    says they have, and where it has no bos or eos token.
    """
    origin = Path(path).expanduser()
    if not origin.exists():
        origin = _download(path, revision)
    for file in [origin] if origin.is_file() else [origin / name for name in (JSON, MODEL, CONFIG, *BESIDE)]:
        if file.is_file():
            check_fetched(file)
    if _was_trained_here(origin):
        for name in (JSON, CONFIG):
            shutil.copyfile(origin / name, directory / name)
    else:
        _bring(origin, path, directory)
    try:
        load_tokenizer(directory)
    except Exception as error:  # of a bare kind, where the library does not know what a file says
        raise _unreadable(path, error) from None


def _bring(origin: Path, path: str, directory: Path) -> None:
    with TemporaryDirectory() as temporary:
        model = origin / MODEL if origin.is_dir() else origin
        if model.is_file() and not (origin / JSON).exists():
            origin = Path(temporary)
            _convert(model, origin)
        tokenizer = _open(origin, path)
        if origin == Path(temporary):
            _set_ends(tokenizer, json.loads((origin / CONFIG).read_text()))
        for name in ("bos_token", "eos_token"):
            if not getattr(tokenizer, name):
                raise UserError(f"the tokenizer in {path} has no {name}: add it to its tokenizer_config.json")
        vocabulary = tokenizer.get_vocab()
        for token, number in _declared(origin, path).items():
            if (made := vocabulary.get(token)) != number:
                raise UserError(
                    f"the tokenizer in {path} says that token {number} is {token!r}, and makes it {made}: bring its "
                    f"vocabulary and its list of added tokens together, or give its tokenizer.json"
                )
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    config = json.loads((directory / CONFIG).read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # which takes the tokenizer.json as it stands
    for of_the_origin in ("is_local", "local_files_only", "auto_map"):
        config.pop(of_the_origin, None)
    (directory / CONFIG).write_text(json.dumps(config, indent=1))


def _was_trained_here(directory: Path) -> bool:
    try:
        trained_here = bool(json.loads((directory / CONFIG).read_text()) == TRAINED_HERE)
    except (OSError, ValueError):
        return False
    return (
        trained_here
        and (directory / JSON).exists()
        and not any((directory / name).exists() for name in (*BESIDE, TEMPLATES))
    )


def _open(origin: Path, path: str) -> Any:
    """The transformers tokenizer of a directory: its tokenizer.json as it stands, or what its other files make."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (origin / JSON).exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(origin)
        else:
            tokenizer = AutoTokenizer.from_pretrained(origin, trust_remote_code=False)
    except Exception as error:  # of a bare kind, where the library does not know what a file says
        raise (_unreadable(path, error) if (origin / JSON).exists() else _no_tokenizer(path)) from None
    if not tokenizer.is_fast or tokenizer.vocab_size == 0:
        raise _no_tokenizer(path)
    return tokenizer


def _set_ends(tokenizer: Any, config: dict[str, Any]) -> None:
    """What is put around a text, as a configuration says; where it says nothing, bos before it, as for LLaMA."""
    said = {name: bool(config[name]) for name in ("add_bos_token", "add_eos_token") if name in config}
    if said:
        tokenizer.add_bos_token = said.get("add_bos_token", True)
        tokenizer.add_eos_token = said.get("add_eos_token", False)


def _declared(origin: Path, path: str) -> dict[str, int]:
    """The number of each token that a tokenizer's files say was added to its vocabulary."""
    config, added = ((origin / name) for name in (CONFIG, BESIDE[0]))
    try:
        said = json.loads(config.read_text()).get("added_tokens_decoder") or {} if config.exists() else {}
        declared = {_content(token): int(number) for number, token in said.items()}
        return declared | (dict(json.loads(added.read_text())) if added.exists() else {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from None


def _convert(model: Path, directory: Path) -> None:
    """A SentencePiece model as a tokenizer.json, with what lies beside it; that may name other special tokens."""
    tokenizer, names = sentencepiece_model.convert(model)
    tokenizer.save(str(directory / JSON))
    for file in (model.with_name(name) for name in BESIDE):
        if file.exists():
            shutil.copyfile(file, directory / file.name)
    if (templates := model.with_name(TEMPLATES)).is_dir():
        shutil.copytree(templates, directory / TEMPLATES)
    config = model.with_name(CONFIG)
    try:
        given = json.loads(config.read_text()) if config.exists() else {}
        said = {name: value for name, value in given.items() if value or name not in names}
        said |= {name: _content(said[name]) for name in names if name in said}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise _unreadable(str(config), error) from None
    (directory / CONFIG).write_text(json.dumps(names | said))


def _download(path: str, revision: str | None) -> Path:
    """The tokenizer files of a hub repository, from the hub or its cache on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise _no_tokenizer(path) from error


def _no_tokenizer(path: str) -> UserError:
    return UserError(
        f"no tokenizer in {path}: set tokenizer.path to a directory with tokenizer.json or tokenizer.model, a "
        f"SentencePiece .model file, or the id of a hub repository that can be reached"
    )


def _unreadable(path: str, error: Exception) -> UserError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"the tokenizer in {path} cannot be read ({said}): download or copy it again; where a newer library wrote it, "
        f"have it written for tokenizers {version('tokenizers')}"
    )
