"""What is evaluated: a model, how it reads, and the held-out documents; and loading it in a task.

Shapes: B rows, T tokens of an input, L tokens a window.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config.evaluation import Dtype, MemorySettings
from jobs.models.base import load_llama
from pipelines.batches.dataset import TokenDataset
from pipelines.tokens import tokenizer
from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fot_model import FotCache, FotLlamaForCausalLM

_loaded: dict[tuple[Path, Path, Dtype | None], "FotLlamaForCausalLM"] = {}  # of this worker, one at most


@dataclass(frozen=True)
class Reading:
    """How "model" reads (`memory`, or one of config.RIVALS), lengths of up to `up_to` tokens, all of them by default;
    `longest`: the tokens of the longest text that is asked for."""

    kind: str = "memory"
    up_to: int | None = None
    longest: int = 0

    def reaches(self, tokens: int) -> bool:
        """Whether texts of so many tokens are read."""
        return self.up_to is None or tokens <= self.up_to


@dataclass(frozen=True)
class Subject:
    """`models`: Hugging Face directories with their tokenizer: "model", and "base" where there is one to compare with.
    The base reads with the model's memory layers, so that both see the same. `local`: tokens of the local context.
    `shards`, `documents`: data set and index, where a task needs held-out documents. `reading`: how "model" reads, in
    tasks that can read otherwise than with memory. `dtype`: what they compute in, None for that of their files."""

    models: Mapping[str, Path]
    local: int
    seed: int
    memory: MemorySettings = MemorySettings()  # noqa: RUF009 - it is frozen
    shards: Path | None = None
    documents: Path | None = None
    reading: Reading = Reading()
    dtype: Dtype | None = None

    @property
    def model(self) -> Path:
        return self.models["model"]


def read_config(model: Path) -> dict[str, Any]:
    """A model's configuration, without loading it."""
    return dict(json.loads((model / "config.json").read_text()))


def is_chained(model: Path) -> bool:
    """Whether it was trained as a Transformer-XL, whose layers see the window before and no memory."""
    return bool(read_config(model).get("previous_context"))


@lru_cache(maxsize=2)
def read_tokenizer(model: Path) -> TextTokenizer:
    """The tokenizer beside a model. Raises UserError where there is none."""
    return tokenizer.read_tokenizer(str(model))


def open_documents(subject: Subject) -> TokenDataset:
    """The documents that a task reads."""
    assert subject.shards is not None, "the task reads documents"
    assert subject.documents is not None, "the task reads documents"
    return TokenDataset(subject.shards, subject.documents)


def check_tokenizer(subject: Subject, dataset: TokenDataset) -> None:
    """Raises UserError where the documents are of another tokenizer than a model's."""
    for name, path in subject.models.items():
        if read_tokenizer(path).behaviour != dataset.manifest.tokenizer["behaviour"]:
            remedy = "tokenize them with its tokenizer (tokenizer.path)" if name == "model" else "leave it out"
            raise UserError(
                f"the documents in {dataset.directory} were tokenized otherwise than the {name} {path} does: {remedy}"
            )


def check_models(models: Mapping[str, Path], local: int) -> None:
    """Raises UserError where a model does not hold a local context of `local` tokens, or the base lacks a layer that
    is a memory layer of the model."""
    from fot_model import FotLlamaConfig

    config = FotLlamaConfig.from_pretrained(models["model"])
    for name, path in models.items():
        own = FotLlamaConfig.from_pretrained(path)
        longest = own.window if name == "model" else own.max_position_embeddings
        if local > longest:
            raise UserError(f"{path}: its local context holds up to {longest} tokens, not {local}: lower --local")
        if max(config.mem_layers or [0]) >= own.num_hidden_layers:
            raise UserError(
                f"{path}: it has {own.num_hidden_layers} layers, the memory layers of {models['model']} are "
                f"{config.mem_layers}: give a base of as many layers as the model"
            )


def load_model(path: Path, like: Path, dtype: Dtype | None = None) -> "FotLlamaForCausalLM":
    """In a task: the model on this worker's device, in its file's number type or another one, with the memory and the
    local context of `like`. A worker keeps the last one, and lets go of it before it loads another."""
    if (path, like, dtype) not in _loaded:
        _loaded.clear()
        _loaded[path, like, dtype] = _load(path, like, dtype)
    return _loaded[path, like, dtype]


def _load(path: Path, like: Path, dtype: Dtype | None) -> "FotLlamaForCausalLM":
    import torch

    from fot_model import FotLlamaConfig

    config = FotLlamaConfig.from_pretrained(like)
    settings = {name: getattr(config, name) for name in ("mem_layers", "mem_positionals", "mem_dtype")}
    model: FotLlamaForCausalLM = load_llama(path, dtype=dtype or "auto", local_context=config.window, **settings)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def new_cache(model: "FotLlamaForCausalLM", memory: MemorySettings) -> "FotCache":
    """An empty local context and memory that attends as asked for."""
    from fot_model import DenseMemory, FotCache, TopKMemory
    from fot_model.config import MEMORY_DTYPES

    dtype = MEMORY_DTYPES[memory.dtype] if memory.dtype else model.config.memory_dtype
    held = DenseMemory(dtype) if memory.top_k is None else TopKMemory(memory.top_k, dtype)
    return FotCache(model.config, held)


def read_into(model: "FotLlamaForCausalLM", cache: "FotCache", ids_BT: "Tensor", local: int) -> None:
    """Read [B, T] window by window into memory, which alone grows: no logits are made, no window is kept. To be called
    without gradients."""
    for start in range(0, ids_BT.shape[1], local):
        window_BL = ids_BT[:, start : start + local].to(model.device)
        model(window_BL, past_key_values=cache, last_context_length=local, logits_to_keep=1)
        cache.flush()


def weights_bytes(model: Path, dtype: Dtype | None = None) -> int:
    """Bytes of a model's weights, in its file's number type or another one."""
    files = [*model.glob("*.safetensors")] or [*model.glob("pytorch_model*.bin")]
    size = sum(file.stat().st_size for file in files)
    return size if dtype is None else size * number_bytes(model, dtype) // number_bytes(model)


def number_bytes(model: Path, dtype: Dtype | None = None) -> int:
    """Bytes of a number of a model, in its file's number type or another one."""
    config = read_config(model)
    return 4 if (dtype or config.get("dtype") or config.get("torch_dtype") or "float32") == "float32" else 2


def memory_bytes(
    model: Path, memory: MemorySettings, tokens: int, piece: int, rows: int = 1, dtype: Dtype | None = None
) -> int:
    """Bytes that the keys and values of `rows` x `tokens` take at most, `piece` tokens appended at a time: full buffers
    double, and the old one is there until it is copied."""
    config = read_config(model)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    each = number_bytes(model, memory.dtype or config.get("mem_dtype") or dtype)
    layers, capacity = len(config.get("mem_layers") or []), min(piece, tokens)
    while capacity < tokens:
        capacity *= 2
    buffer = rows * capacity * heads * size * each
    return 2 * layers * buffer + buffer // 2 if layers else 0
