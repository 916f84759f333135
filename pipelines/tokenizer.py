"""Tokenizers as directories of `tokenizer.json` and `tokenizer_config.json`, as Hugging Face lays them out.

Trained here (byte-level BPE) or taken from a checkpoint. Text never becomes a special token: a literal `</s>` in a
document is tokenized as the characters it is made of.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.errors import UserError
from pipelines.hashing import hash_json

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for documents: text in, token ids out, bos and eos around."""

    tokenizer: Tokenizer
    bos: int
    eos: int

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens a text becomes."""
        return hash_json([json.loads(self.tokenizer.to_str()), self.bos, self.eos])

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, between bos and eos."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.bos, *encoding.ids, self.eos] for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without bos and eos."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def load_tokenizer(directory: Path) -> TextTokenizer:
    """A tokenizer directory written by this module.

    `encode_special_tokens` makes the library treat special strings in a text as ordinary characters.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    bos, eos = (_token_id(tokenizer, config[name]) for name in ("bos_token", "eos_token"))
    return TextTokenizer(tokenizer, bos, eos)


def _token_id(tokenizer: Tokenizer, token: str | dict[str, str]) -> int:
    number = tokenizer.token_to_id(token if isinstance(token, str) else token["content"])
    assert number is not None, f"{token} is not in the vocabulary of its own tokenizer"
    return int(number)


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
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def import_tokenizer(path: Path, directory: Path) -> None:
    """Bring any Hugging Face tokenizer directory into the directory.

    Raises UserError where there is none and where it has no bos or eos token.
    """
    from transformers import AutoTokenizer

    remedy = "set tokenizer.path to a directory with tokenizer.json or tokenizer.model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer in {path}: {remedy}") from error
    if not tokenizer.is_fast or tokenizer.vocab_size == 0:
        raise UserError(f"no tokenizer in {path}: {remedy}")
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer in {path} has no {name}: add it to its tokenizer_config.json")
    tokenizer.save_pretrained(directory)
