"""Documents joined in a row: what it does to a training, and what it costs, to keep their attention apart.

    python -m benchmarks.joined_documents MODEL TRAIN.jsonl.gz HELD_OUT.jsonl.gz [--fresh] [--objective fot]

For each seed two copies of a model (a Hugging Face directory; `--fresh`: its shape with random weights) are trained on
the same packed batches in turns, one with `separate_documents`, one without. Measured are whole steps, and the loss of
held-out documents (JSON lines with `text`), each read alone up to two contexts: within the local context, and beyond
it. One thread; medians of CPU seconds.
"""

import argparse
import gzip
import json
import math
import statistics
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.machine import heading
from fot_model import FotLlamaConfig, FotLlamaForCausalLM, default_mem_layers
from jobs.config.training import FotObjective, Objective, StandardObjective
from jobs.train.objective import batch_loss
from pipelines.batches.loader import rank_batches
from pipelines.batches.packing import pack
from pipelines.batches.sampler import BatchShape, CrossBatchSampler
from pipelines.config import Source

Documents = list[np.ndarray]
CPU = torch.device("cpu")


def read_documents(path: Path, tokenizer: AutoTokenizer, count: int | None = None) -> Documents:
    with gzip.open(path, "rt") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, count)]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return [np.array([tokenizer.bos_token_id, *own, tokenizer.eos_token_id]) for own in ids]


def sampler_of(documents: Documents, shape: BatchShape, seed: int) -> CrossBatchSampler:
    """Over documents in memory."""
    lengths = np.array([len(own) for own in documents])
    dataset = SimpleNamespace(
        manifest=SimpleNamespace(hash="memory"),
        length=lengths,
        cluster=np.arange(len(documents)),
        tokens=lambda document, start, end: documents[document][start:end],
    )
    groups = [pack(np.arange(len(documents)), lengths, shape.group_tokens)]
    return CrossBatchSampler(dataset, groups, [Source(name="s", path="memory")], shape, seed)


def build(model: str, objective: Objective, seed: int, fresh: bool) -> FotLlamaForCausalLM:
    torch.manual_seed(seed)
    config = FotLlamaConfig.from_pretrained(model)
    config.mem_layers = default_mem_layers(config.num_hidden_layers) if objective.kind == "fot" else []
    config.local_context = objective.context
    if fresh:
        return FotLlamaForCausalLM(config).train()
    return FotLlamaForCausalLM.from_pretrained(model, config=config).train()


@torch.no_grad()
def held_out_losses(model: FotLlamaForCausalLM, documents: Documents, context: int) -> tuple[float, float]:
    """Nats a token of the first context of each document, and of what comes in the second."""
    model.eval()
    sums, counts = np.zeros(2), np.zeros(2)
    for own in documents:
        ids = torch.from_numpy(own[: 2 * context + 1])[None]
        logits = model(ids[:, :-1]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy()
        for place, part in enumerate((losses[:context], losses[context:])):
            sums[place] += part.sum()
            counts[place] += len(part)
    model.train()
    within, beyond = (sums / counts).tolist()
    return within, beyond


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--objective", choices=["fot", "standard"], default="fot")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = read_documents(arguments.train, tokenizer)
    held_out = [own for own in read_documents(arguments.held_out, tokenizer, 400) if len(own) > arguments.context][:100]
    steps, context = arguments.steps, arguments.context
    one: Objective = StandardObjective(context=context)
    if arguments.objective == "fot":
        one = FotObjective(context=context, segments=((0, 0), (1, 2), (2, 2), (3, 2)))
    both = {on: one.model_copy(update={"separate_documents": on}) for on in (True, False)}
    shape = BatchShape(context, one.contexts, 16 // one.contexts, 1)
    print(heading(CPU), end="\n\n")
    print(f"{shape.tokens_per_step} tokens a step, {steps} steps\n")
    print("| seed | apart | rows with several documents | loss within | beyond | CPU seconds a step |")
    print("|---|---|---|---|---|---|")
    for seed in range(arguments.seeds):
        sampler = sampler_of(documents, shape, seed)
        models = {on: build(arguments.model, one, seed, arguments.fresh) for on in both}
        optimizers = {on: torch.optim.AdamW(made.parameters(), betas=(0.9, 0.95)) for on, made in models.items()}
        seconds: dict[bool, list[float]] = {on: [] for on in both}
        several = []
        for step, batch in enumerate(rank_batches(sampler, range(steps), 0, 1)):
            rate = arguments.rate * min((step + 1) / 30, (1 + math.cos(math.pi * step / steps)) / 2)
            several.append((batch.document_ids != batch.document_ids[:, :1]).any(1).float().mean().item())
            for on, objective in both.items():
                began = time.process_time()
                for group in optimizers[on].param_groups:
                    group["lr"] = rate
                optimizers[on].zero_grad()
                batch_loss(models[on], batch, objective, step, seed, sampler.labels(step)).backward()
                torch.nn.utils.clip_grad_norm_(models[on].parameters(), 1.0)
                optimizers[on].step()
                seconds[on].append(time.process_time() - began)
        for on, model in models.items():
            within, beyond = held_out_losses(model, held_out, context)
            cost = statistics.median(seconds[on])
            row = f"| {seed} | {on} | {statistics.mean(several):.2f} | {within:.4f} | {beyond:.4f} | {cost:.3f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
