"""What is evaluated: a model, how it reads, and the held-out documents; and loading it in a task.

Shapes: B rows, T tokens of an input, L tokens a window.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.evaluate.config import Memory
from pipelines.dataset import TokenDataset
from pipelines.errors import UserError
from pipelines.tokenizer import TextTokenizer, import_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from fot_model import FotCache, FotLlamaForCausalLM

MEMORY_SETTINGS = ("mem_layers", "mem_positionals")


@dataclass(frozen=True)
class Subject:
    """`models`: Hugging Face directories with their tokenizer: "model", and "base" where there is one to compare with.
    The base reads with the model's memory layers, so that both see the same. `local`: tokens of the local context.
    `shards`, `documents`: data set and index, where a task needs held-out documents. `chained`: the model is a
    Transformer-XL, whose layers see the window before and no memory."""

    models: Mapping[str, Path]
    local: int
    seed: int
    memory: Memory = Memory()  # noqa: RUF009 - it is frozen
    shards: Path | None = None
    documents: Path | None = None
    chained: bool = False

    @property
    def model(self) -> Path:
        return self.models["model"]


def read_config(model: Path) -> dict[str, Any]:
    """A model's configuration, without loading it."""
    return dict(json.loads((model / "config.json").read_text()))


@lru_cache(maxsize=2)
def read_tokenizer(model: Path) -> TextTokenizer:
    """The tokenizer beside a model. Raises UserError where there is none."""
    with TemporaryDirectory() as directory:
        import_tokenizer(str(model), Path(directory))
        return load_tokenizer(Path(directory))


def open_documents(subject: Subject) -> TokenDataset:
    """The documents that a task reads."""
    assert subject.shards is not None, "the task reads documents"
    assert subject.documents is not None, "the task reads documents"
    return TokenDataset(subject.shards, subject.documents)


def check_tokenizer(subject: Subject, dataset: TokenDataset) -> None:
    """Raises UserError where the documents are of another tokenizer than the model's."""
    if read_tokenizer(subject.model).behaviour != dataset.manifest.tokenizer["behaviour"]:
        raise UserError(
            f"the documents in {dataset.directory} were tokenized otherwise than {subject.model} does: tokenize them "
            f"with its tokenizer (tokenizer.path)"
        )


@lru_cache(maxsize=1)
def load_model(subject_model: Path, like: Path) -> "FotLlamaForCausalLM":
    """In a task: the model on this worker's device, in its own number type, with the memory layers of `like`. A worker
    keeps the last one."""
    import torch

    from fot_model import FotLlamaForCausalLM

    config = read_config(like)
    settings = {name: config[name] for name in MEMORY_SETTINGS if name in config}
    model = FotLlamaForCausalLM.from_pretrained(subject_model, dtype="auto", **settings).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def new_cache(model: "FotLlamaForCausalLM", memory: Memory) -> "FotCache":
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


def weights_bytes(model: Path) -> int:
    """Bytes of a model's weights."""
    files = [*model.glob("*.safetensors")] or [*model.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def memory_bytes(model: Path, memory: Memory, tokens: int, rows: int = 1) -> int:
    """Bytes of the keys and values of `rows` x `tokens` in memory, with the spare room of a buffer that just grew."""
    config = read_config(model)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kind = memory.dtype or config.get("mem_dtype") or config.get("dtype") or config.get("torch_dtype") or "float32"
    each = 4 if kind == "float32" else 2
    return 3 * rows * tokens * len(config.get("mem_layers") or []) * heads * size * each
