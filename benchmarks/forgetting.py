"""What fine-tuning cost on short documents: perplexity of each whole document within the local context, model by model.

    python -m benchmarks.forgetting DOCUMENTS.jsonl.gz COUNT BASE TUNED ...

Documents are the first COUNT of a file of JSON lines (`text`), cut at the base's context; models are Hugging Face
directories with the base's tokenizer. One thread; memory is not used.
"""

import gzip
import json
import math
import sys

import torch
from transformers import AutoTokenizer

from benchmarks.machine import heading
from fot_model import FotLlamaForCausalLM


@torch.inference_mode()
def perplexity(model: FotLlamaForCausalLM, documents: list[torch.Tensor]) -> float:
    """Per token, over all predictions of all documents [1, L]."""
    losses = [model(ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1) for ids in documents]
    return math.exp(math.fsum(losses) / sum(ids.shape[1] - 1 for ids in documents))


def main() -> None:
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    path, count, *models = sys.argv[1:]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    with gzip.open(path, "rt") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(int(count)), lines, strict=False)]
    print(heading(torch.device("cpu")), end="\n\n")
    print(f"| model | perplexity of {len(texts)} documents | of the first |")
    print("|---|---|---|")
    first = 0.0
    for name in models:
        model = FotLlamaForCausalLM.from_pretrained(name).eval()
        window = FotLlamaForCausalLM.config_class.from_pretrained(models[0]).max_position_embeddings
        documents = [tokenizer(text, return_tensors="pt").input_ids[:, :window] for text in texts]
        found = perplexity(model, documents)
        first = first or found
        print(f"| {name} | {found:.3f} | {found / first:.4f} |", flush=True)


if __name__ == "__main__":
    main()
