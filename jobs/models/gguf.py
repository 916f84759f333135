"""A GGUF file of llama architecture as a Hugging Face directory: weights in float32, configuration, tokenizer.

transformers reads such files, but refuses to save what it read; it passes over tensors that it has no place for, over
RoPE scaling, and over how some vocabularies split their text. So the header is checked first, and what would not be
carried over is refused by name; the tensors go into a plain LLaMA; and what was written is read again and must give the
same logits, to the bit, and the same tokens. In memory are the weights once, in float32.
"""

import io
import json
import os
import stat
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tokens.tokenizer import PROBES
from pipelines.workflow.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

ARCHITECTURE = "llama"
MAGIC = b"GGUF"
NEEDED = ("gguf", "accelerate")
# Vocabularies of byte-level BPE by how they split text, where what is made of them here gives the tokens of llama.cpp.
SPLITS = {"gpt-2", "smollm", "llama-bpe", "llama3", "llama-v3"}
IGNORE_MERGES = {
    "llama-bpe",
    "llama3",
    "llama-v3",
}  # a word that is a token is that token, however merges would make it
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
READ_BACK = 32  # tokens of the forward passes that are compared
# transformers' names, by those of a GGUF header behind "llama."
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}


def check_magic(file: Path) -> None:
    """Raises UserError for what is no GGUF file, without reading it."""
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UserError(
                f"base.checkpoint {file} is neither a directory nor a GGUF file (it does not begin with GGUF): give a "
                f"Hugging Face directory or a .gguf file"
            )


def read_gguf_config(file: Path) -> dict[str, Any]:
    """The configuration that a GGUF file states, under config.json's names.

    Raises UserError for what is no whole GGUF file of llama architecture, and for what would not be carried over.
    """
    return _stated(file, _open(file))


def _stated(file: Path, reader: "GGUFReader") -> dict[str, Any]:
    stated = {name: _value(reader, f"{ARCHITECTURE}.{key}") for key, name in SIZES.items()}
    if missing := [key for key, name in SIZES.items() if not isinstance(stated[name], int)]:
        raise UserError(f"{file}: its header has no {ARCHITECTURE}.{missing[0]}: download or convert it again")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # innermost dimension first
    _check_tensors(file, shapes, stated["num_hidden_layers"])
    _check_carried_over(file, reader)
    heads = stated["num_attention_heads"]
    return {
        "model_type": ARCHITECTURE,
        **stated,
        "vocab_size": shapes["token_embd.weight"][1],
        "num_key_value_heads": _value(reader, f"{ARCHITECTURE}.attention.head_count_kv") or heads,
        "head_dim": _value(reader, f"{ARCHITECTURE}.rope.dimension_count") or stated["hidden_size"] // heads,
        "rope_theta": _value(reader, f"{ARCHITECTURE}.rope.freq_base") or 10000.0,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def convert_gguf(file: Path, target: Path) -> None:
    """Write the Hugging Face directory `target`. Raises UserError as `read_gguf_config` does, and where what was
    written is not what was read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    reader = _open(file)
    stated = _stated(file, reader)
    header = {key: _value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_space_prefix")}
    del reader
    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():  # it draws a bar that cannot be turned off
        warnings.simplefilter("ignore")  # the file's memory map is read-only
        read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids_BT = torch.arange(READ_BACK)[None] * 7 % stated["vocab_size"]
    with torch.inference_mode():
        expected_BTV = read(ids_BT).logits
    # Marked as quantized, the model cannot be saved; its tensors can, as a plain LLaMA's.
    left_out = {"quantization_config", "_name_or_path", "_model_name_or_path", "architectures"}
    config = LlamaConfig(**{name: value for name, value in read.config.to_dict().items() if name not in left_out})
    if differs := [name for name, value in stated.items() if _of(config, name) != value]:
        name = differs[0]
        raise UserError(f"{file}: its {name} is {stated[name]}, and was read as {_of(config, name)}: it cannot be used")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    del read, model
    mode = stat.S_IMODE((target / "config.json").stat().st_mode)
    for weights in target.glob("*.safetensors"):
        os.chmod(weights, mode)  # safetensors lets no one else read it
    _write_tokenizer(file, header, stated["vocab_size"], target)
    with torch.inference_mode():
        got_BTV = LlamaForCausalLM.from_pretrained(target, dtype="auto").eval()(ids_BT).logits
    if not torch.equal(got_BTV, expected_BTV):
        raise UserError(f"{file}: what was written of it gives other logits than what was read: it cannot be used")


def _open(file: Path) -> "GGUFReader":
    check_magic(file)
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise UserError(f"base.checkpoint {file}: reading GGUF needs {missing[0]}: pip install 'fot[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{file} is damaged or cut off ({_first_line(error)}): download or copy it again") from None
    if (architecture := _value(reader, "general.architecture")) != ARCHITECTURE:
        raise UserError(f"base.checkpoint {file} is no LLaMA: its header says architecture {architecture!r}")
    return reader


def _value(reader: "GGUFReader", key: str) -> Any:
    """What the header says, None where it does not."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_tensors(file: Path, there: dict[str, list[int]], layers: int) -> None:
    """Every tensor of the file has its place in a LLaMA, and each place its tensor."""
    from gguf import MODEL_TENSOR, TENSOR_NAMES

    of_a_layer = ("ATTN_NORM", "ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT", "FFN_NORM", "FFN_GATE", "FFN_UP", "FFN_DOWN")
    names = [TENSOR_NAMES[MODEL_TENSOR[name]] for name in ("TOKEN_EMBD", "OUTPUT_NORM")]
    names += [TENSOR_NAMES[MODEL_TENSOR[name]].format(bid=n) for n in range(layers) for name in of_a_layer]
    needed = {f"{name}.weight" for name in names}
    tied = {f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight"}
    if missing := sorted(needed - set(there)):
        raise UserError(f"{file} holds no {missing[0]}: download or convert it again")
    if more := sorted(set(there) - needed - tied):
        scaled = ", the scaled RoPE of Llama 3.1 and later" if more[0] == "rope_freqs.weight" else ""
        raise UserError(
            f"{file} holds {more[0]}{scaled}, which a GGUF's conversion cannot carry over: give the model's Hugging "
            f"Face directory or hub id"
        )


def _check_carried_over(file: Path, reader: "GGUFReader") -> None:
    """Nothing that the header states is lost."""
    remedy = "give the model's Hugging Face directory or hub id"
    scaling = _value(reader, f"{ARCHITECTURE}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise UserError(f"{file} has a RoPE scaled by {scaling!r}, which cannot be carried over: {remedy}")
    kind, split = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and split not in SPLITS):
        named = kind if kind not in ("llama", "gpt2") else f"{kind}, split as {split!r}"
        raise UserError(f"{file} has a tokenizer ({named}) that cannot be made of it: {remedy}")


def _of(config: Any, name: str) -> Any:
    return config.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(config, name)


def _write_tokenizer(file: Path, header: Mapping[str, Any], size: int, target: Path) -> None:
    """The tokenizer as transformers makes it, mended where it splits otherwise than the model's or has tokens beyond
    the model's `size`, and read again. `header`: what the file says of it."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    definition = json.loads(read.backend_tokenizer.to_str())
    # GPT-2's <|endoftext|> is added to every byte-level BPE, the file's or not.
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < size]
    backend = Tokenizer.from_str(json.dumps(definition))
    if header["model"] == "llama":  # as SentencePiece: a space is put before a text, also before one of its own
        first = [] if header["add_space_prefix"] is False else [normalizers.Prepend("\u2581")]
        backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
    if header["pre"] == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if header["pre"] in IGNORE_MERGES:
        backend.model.ignore_merges = True
    vocabulary = backend.get_vocab()
    special = {name: getattr(read, name) for name in SPECIAL if getattr(read, name) in vocabulary}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(target)
    written = PreTrainedTokenizerFast.from_pretrained(target)
    if _described(written) != _described(tokenizer) or max(written.get_vocab().values()) >= size:
        raise UserError(f"{file}: its tokenizer as written gives other tokens than as read: it cannot be used")


def _described(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """What tells tokenizers apart: special tokens, the chat template, the tokens of texts made for that."""
    special = [getattr(tokenizer, name) for name in SPECIAL]
    return [special, tokenizer.chat_template, len(tokenizer), [tokenizer.encode(text) for text in PROBES]]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
