"""How far a model's memory reaches: accuracy on the value tokens of questions, by tokens of dictionary in memory.

One memory of one row grows through all sizes; at each size questions are asked of it, which it does not keep. With a
single memory layer its keys and values come from the layers below, which see the local context alone: contexts are read
in batches, each row with an empty memory, and joined. With several, the upper ones depend on what the lower ones
found, so contexts are read in order, one at a time, by the memory itself.

Cost: at M tokens a question's context costs 4 H D M operations for every position that attends. Where the memory layer
is the last, only positions whose next token is scored do (100 of 256): the others decide on nothing.

Shapes: B contexts, L tokens, H query heads, Hk key/value heads, P positions that attend, D head size, M tokens in
memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, TopKMemory
from fot_model.attention import MASKED, Partial, wide_dtype
from fot_model.config import MEMORY_DTYPES
from jobs.config.dictionary import RECORDS, WINDOW, DictionaryEvaluation
from jobs.evaluate.asking import SharedMemory
from jobs.evaluate.dictionary.task import IGNORE, Array, Dictionary, answers, contexts
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically
from pipelines.workflow.hashing import hash_file, hash_json
from pipelines.workflow.progress import Progress

ASKED_AT_ONCE = 4  # contexts of questions that go through the memory together
Accuracy = dict[str, dict[str, dict[str, int]]]  # way of attending: tokens: correct, questions (value tokens asked for)


@dataclass(frozen=True)
class AccuracyRow:
    """A line of the table: accuracy by way of attending and tokens in memory; `trials`: value tokens asked a seed."""

    way: str
    tokens: int
    median: float
    by_seed: tuple[float, ...]
    trials: int


class Remembered(TopKMemory):
    """Read with dense attention, asked with either."""

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        return DenseMemory.attend(self, layer, q_BHLD, scale)


Attend = Callable[[Remembered, int, Tensor, float], Partial | None]
WAYS: dict[str, Attend] = {"dense": DenseMemory.attend, "top_k": TopKMemory.attend}


class Asked(SharedMemory):
    """A memory of one row that all rows of a batch ask, at some positions only, in the `way` of a kind of memory."""

    def __init__(self, memory: Remembered, way: Attend, positions: Sequence[int]) -> None:
        super().__init__(memory)
        self._memory, self._way, self._positions = memory, way, list(positions)

    def attend(self, layer: int, q_BHLD: Tensor, scale: float) -> Partial | None:
        """Positions that do not ask get what an empty memory would give."""
        B = q_BHLD.shape[0]
        q_1HPD = q_BHLD[:, :, self._positions].transpose(0, 1).flatten(1, 2)[None]
        part = self._way(self._memory, layer, q_1HPD, scale)
        assert part is not None, "the memory is not empty"
        out_BHLD = torch.zeros_like(q_BHLD, dtype=part[0].dtype)
        lse_BHL = torch.full(q_BHLD.shape[:3], MASKED, dtype=wide_dtype(q_BHLD), device=q_BHLD.device)
        out_BHLD[:, :, self._positions] = part[0][0].unflatten(1, (B, -1)).transpose(0, 1)
        lse_BHL[:, :, self._positions] = part[1][0].unflatten(1, (B, -1)).transpose(0, 1)
        return out_BHLD, lse_BHL


def accuracy(model: Path, settings: DictionaryEvaluation, seed: int, output: Path) -> Accuracy:
    """{"dense": {tokens: {"correct": n, "questions": n}}, "top_k": ...}, counted in value tokens (4 a question).

    output/accuracy.json keeps it a size at a time; what is there of the same model, settings and seed is not asked
    again. Raises UserError where the largest memory takes more than `settings.max_gigabytes`.
    """
    config = FotLlamaConfig.from_pretrained(model)
    check_memory(config, settings)
    kept = output / "accuracy.json"
    what = settings.model_dump(mode="json", exclude={"tokens", "batch", "max_gigabytes"})
    key = hash_json([what, hash_file(model / "model.safetensors"), seed])
    done = json.loads(kept.read_text()) if kept.exists() else {}
    results: Accuracy = done["accuracy"] if done.get("of") == key else {}
    ways = [way for way in WAYS if way == "dense" or settings.top_k is not None]
    left = [size for size in settings.tokens if any(str(size) not in results.get(way, {}) for way in ways)]
    if left:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = FotLlamaForCausalLM.from_pretrained(model).to(device).eval()
        dictionary = Dictionary(settings.seed + seed)
        reader, attended = DictionaryReader(loaded, dictionary, settings), 0
        work = sum(size * settings.windows * len(ways) for size in left)  # what takes longest: tokens attended to
        with torch.inference_mode(), Progress(f"dictionary seed {seed}", work, "tokens") as progress:
            for size in left:
                for tokens in reader.grow(size):
                    progress.set(attended, f"reading {tokens:,} of {size:,}")
                for way in ways:
                    right = asked = 0
                    for questions in batches(dictionary, size, settings, seed):
                        counted = ask(loaded, reader.memory, way, questions)
                        right, asked = right + counted[0], asked + counted[1]
                        attended += size * len(questions)
                        progress.set(attended, f"{way} at {size:,}: {right / asked:.3f}")
                    results.setdefault(way, {})[str(size)] = {"correct": right, "questions": asked}
                output.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, json.dumps({"of": key, "accuracy": results}, indent=1).encode())
    return {way: {str(size): results[way][str(size)] for size in settings.tokens} for way in ways}


class DictionaryReader:
    """A growing memory of a dictionary's first contexts."""

    def __init__(self, model: FotLlamaForCausalLM, dictionary: Dictionary, settings: DictionaryEvaluation) -> None:
        self._model, self._dictionary = model, dictionary
        self._batch = settings.batch
        dtype = MEMORY_DTYPES[settings.dtype]
        self.memory = Remembered(settings.top_k or 1, dtype)

    def grow(self, tokens: int) -> Iterator[int]:
        """Read on until so many tokens are in memory; yields how many are, now and then."""
        while (read := len(self.memory)) < tokens:
            end = min(tokens // WINDOW, read // WINDOW + self._batch)
            numbers = np.arange(read // WINDOW * RECORDS, end * RECORDS)
            rows_BL = torch.from_numpy(contexts(self._dictionary.records(numbers), RECORDS)).to(self._model.device)
            if len(self._model.config.mem_layers) == 1:
                self._append_apart(rows_BL)
            else:
                for row_L in rows_BL:
                    cache = FotCache(self._model.config, self.memory)
                    self._model(row_L[None], past_key_values=cache, logits_to_keep=1)
                    cache.flush()
            yield len(self.memory)

    def _append_apart(self, rows_BL: Tensor) -> None:
        """Each context with an empty memory."""
        (layer,) = self._model.config.mem_layers
        own = DenseMemory()
        cache = FotCache(self._model.config, own)
        self._model(rows_BL, past_key_values=cache, logits_to_keep=1)
        cache.flush()  # keys in memory are those of position 0
        held = own.state_dict()
        keys, values = (held[f"{layer}.{name}"].transpose(0, 1).flatten(1, 2)[None] for name in ("keys", "values"))
        self.memory.append(layer, keys, values)


def batches(dictionary: Dictionary, tokens: int, settings: DictionaryEvaluation, seed: int) -> Iterator[Array]:
    """Contexts of questions [B, L] about the records that so many tokens hold; those of a context all differ."""
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, seed, tokens))))
    held = tokens // WINDOW * RECORDS
    numbers = np.stack([draw.choice(held, RECORDS, replace=False) for _ in range(settings.windows)])
    for start in range(0, settings.windows, ASKED_AT_ONCE):
        yield contexts(dictionary.questions(numbers[start : start + ASKED_AT_ONCE].ravel()), RECORDS)


def ask(model: FotLlamaForCausalLM, memory: Remembered, way: str, questions_BL: Array) -> tuple[int, int]:
    """(right, asked) value tokens; the memory is left as it is."""
    wanted_BL = torch.from_numpy(answers(questions_BL)[:, 1:]).to(model.device)
    scored_BL = wanted_BL != IGNORE
    last = model.config.mem_layers == [model.config.num_hidden_layers - 1]
    positions = scored_BL[0].nonzero().flatten().tolist() if last else range(questions_BL.shape[1])
    cache = FotCache(model.config, Asked(memory, WAYS[way], positions))
    logits_BLV = model(torch.from_numpy(questions_BL).to(model.device), past_key_values=cache).logits[:, :-1]
    return int((logits_BLV.argmax(-1)[scored_BL] == wanted_BL[scored_BL]).sum()), int(scored_BL.sum())


def memory_size(config: FotLlamaConfig, settings: DictionaryEvaluation) -> int:
    """Bytes of the largest memory's keys and values."""
    numbers = 2 * len(config.mem_layers or []) * config.num_key_value_heads * config.head_dim
    return numbers * MEMORY_DTYPES[settings.dtype].itemsize * settings.tokens[-1]


def check_memory(config: FotLlamaConfig, settings: DictionaryEvaluation) -> None:
    """Raises UserError where the largest memory takes more than is allowed."""
    largest, size = settings.tokens[-1], memory_size(config, settings)
    fits = int(settings.max_gigabytes * 2**30 * largest / size) // WINDOW * WINDOW
    if largest > fits:
        raise UserError(
            f"evaluation.tokens: {largest} tokens take {size / 2**30:.1f} GiB in {settings.dtype}, "
            f"evaluation.max_gigabytes is {settings.max_gigabytes:g}: {fits} tokens fit"
        )


def summarize(
    by_seed: Mapping[int, Accuracy], top_k: int | None
) -> tuple[list[AccuracyRow], list[tuple[str, float, int]]]:
    """The table's rows, and (name, value, step) for a tracking server: medians of the seeds, step the tokens."""
    rows, metrics = [], []
    ways = next(iter(by_seed.values()))
    for way in ways:
        for size in ways[way]:
            shares = [share(accuracy[way][size]) for accuracy in by_seed.values()]
            rows.append(
                AccuracyRow(
                    "dense" if way == "dense" else f"top-k (k = {top_k})",
                    int(size),
                    median(shares),
                    tuple(shares),
                    min(accuracy[way][size]["questions"] for accuracy in by_seed.values()),
                )
            )
            metrics.append((f"dictionary/{way}", median(shares), int(size)))
    return rows, metrics


def share(counted: Mapping[str, int]) -> float:
    """The share that is right."""
    return counted["correct"] / counted["questions"]
