"""A FoT model as the lm-evaluation-harness asks it: log-probabilities of continuations and of whole texts, and greedy
text.

It reads as `model.generate` does: a full local context hands its first half to memory. So an input within the local
context is what any LLaMA makes of it, and a longer one is read to its beginning; nothing is cut off. Every text begins
with bos; strings like `</s>` in it are text.

Shapes: B rows, L tokens, T tokens of an input, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from fot_model import FotCache, FotLlamaForCausalLM
from jobs.config.evaluation import Dtype, MemorySettings
from jobs.evaluate.subject import load_model, new_cache, read_tokenizer
from pipelines.workflow.errors import UserError

NEW_TOKENS = 256  # at most, where a task does not say


@register_model("fot")
class FotLM(TemplateLM):
    """`pretrained`: a directory with model and tokenizer; `like`: one whose memory layers it reads with (its own by
    default); `local`: tokens of the local context; `batch_size`: rows of inputs that fit it, read together;
    `dtype`: what it computes in, by default as its file."""

    def __init__(
        self,
        pretrained: str | Path,
        local: int,
        like: str | Path | None = None,
        memory: MemorySettings | None = None,
        batch_size: int = 8,
        dtype: Dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = load_model(Path(pretrained), Path(like or pretrained), dtype)
        self._tokenizer = read_tokenizer(Path(pretrained))
        self._local, self._memory, self._batch_size = local, memory or MemorySettings(), batch_size

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.bos, *ids]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, after bos."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            found.append(self._score(ids[:1], ids[1:])[0] if len(ids) > 1 else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one), shorter inputs in batches."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        by_length = sorted(range(len(requests)), key=lambda number: -sum(map(len, requests[number][1:])))
        short = [number for number in by_length if sum(map(len, requests[number][1:])) <= self._local + 1]
        for number in by_length[: len(by_length) - len(short)]:
            found[number] = self._score(*requests[number][1:])
        for first in range(0, len(short), self._batch_size):
            batch = short[first : first + self._batch_size]
            for number, answer in zip(batch, self._score_short([requests[n][1:] for n in batch]), strict=True):
                found[number] = answer
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy text up to the first of the strings that end it, or eos."""
        texts = []
        for request in requests:
            context, given = request.args
            settings = normalize_gen_kwargs(given, NEW_TOKENS)
            if settings["do_sample"]:
                raise UserError(f"lm_eval task {request.task_name} draws its answers (do_sample): leave it out")
            texts.append(self._generate(self.tok_encode(context), settings["until"], settings["max_gen_toks"]))
            self.cache_hook.add_partial("generate_until", (context, given), texts[-1])
        return texts

    @torch.inference_mode()
    def _generate(self, ids: list[int], stops: list[str], room: int) -> str:
        cache, made, text = new_cache(self.model, self._memory), list[int](), ""
        new_BL = torch.tensor([ids])
        while len(made) < room:
            (logits_BLV,) = self._read(cache, new_BL, 1)
            new_BL = logits_BLV[:, -1:].argmax(-1)
            if (token := int(new_BL)) == self._tokenizer.eos:
                break
            made.append(token)
            text = str(self._tokenizer.tokenizer.decode(made))
            if any(stop in text for stop in stops if stop):
                break
        return str(postprocess_generated_text(text, stops, None))

    @torch.inference_mode()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids_BT, wanted = torch.tensor([context + continuation]), len(continuation)
        total, greedy = 0.0, True
        for logits_BLV in self._read(new_cache(self.model, self._memory), ids_BT[:, :-1], wanted):
            next_BL = ids_BT[:, -wanted:][:, : logits_BLV.shape[1]].to(logits_BLV.device)
            wanted -= logits_BLV.shape[1]
            part, all_greedy = _of_tokens(logits_BLV[0], next_BL[0])
            total, greedy = total + part, greedy and all_greedy
        return total, greedy

    @torch.inference_mode()
    def _score_short(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of inputs that fit the local context: one pass without memory, padded on the right."""
        length = max(len(context) + len(continuation) for context, continuation in batch)
        first = min(len(context) for context, _ in batch)  # token that is to be predicted
        ids_BT = torch.tensor([[*row, *more, *[0] * (length - len(row) - len(more))] for row, more in batch])
        ids_BT = ids_BT.to(self.model.device)
        logits_BLV = self.model(
            ids_BT[:, :-1], use_cache=False, last_context_length=self._local, logits_to_keep=max(1, length - first)
        ).logits
        ends = [slice(len(context) - first, len(context) - first + len(more)) for context, more in batch]
        return [
            _of_tokens(logits_LV[end], ids_T[first:][end])
            for logits_LV, ids_T, end in zip(logits_BLV, ids_BT, ends, strict=True)
        ]

    def _read(self, cache: FotCache, ids_BT: Tensor, wanted: int) -> Iterator[Tensor]:
        """Read on from what the cache holds; logits [B, L, V] of the last `wanted` tokens, window by window."""
        model: FotLlamaForCausalLM = self.model
        start, length, local = 0, ids_BT.shape[1], self._local
        while start < length:
            if cache.local_length >= local:
                cache.evict(local - local // 2)
            end = min(length, start + local - cache.local_length)
            here = min(end - start, max(0, end - (length - wanted)))
            window_BL = ids_BT[:, start:end].to(model.device)
            logits_BLV = model(
                window_BL, past_key_values=cache, last_context_length=local, logits_to_keep=max(1, here)
            ).logits
            cache.settle()
            if here:
                yield logits_BLV
            start = end


def _of_tokens(logits_LV: Tensor, ids_L: Tensor) -> tuple[float, bool]:
    """Log-probability of the tokens, each after those before it, and whether all are the likeliest."""
    chosen_L = logits_LV.float().log_softmax(-1).gather(1, ids_L[:, None])
    return float(chosen_L.double().sum()), bool((logits_LV.argmax(-1) == ids_L).all())
