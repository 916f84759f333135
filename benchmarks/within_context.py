"""Memory layers change nothing within one context: loss of a LLaMA as it is, and with memory layers untrained.

    python -m benchmarks.within_context CHECKPOINT DOCUMENTS MEM_LAYER...

DOCUMENTS: a .jsonl.gz file with a `text` a line; each is cut at the model's context. Prints nats a token and the
largest difference of logits.
"""

import argparse
import gzip
import json
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.machine import heading
from fot_model import FotLlamaForCausalLM


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("mem_layers", type=int, nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    plain = LlamaForCausalLM.from_pretrained(asked.checkpoint).eval()
    focused = FotLlamaForCausalLM.from_pretrained(asked.checkpoint, mem_layers=asked.mem_layers).eval()
    totals, tokens, largest = [0.0, 0.0], 0, 0.0
    with gzip.open(asked.documents, "rt") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
            ids_1L = torch.tensor([[tokenizer.bos_token_id, *ids][: plain.config.max_position_embeddings]])
            logits = [model(ids_1L).logits[0, :-1] for model in (plain, focused)]
            for place, found in enumerate(logits):
                totals[place] += functional.cross_entropy(found, ids_1L[0, 1:], reduction="sum").item()
            largest = max(largest, (logits[0] - logits[1]).abs().max().item())
            tokens += ids_1L.shape[1] - 1
    print(heading(torch.device("cpu")), end="\n\n")
    print("| tokens | LLaMA nats/token | with memory layers | largest difference of logits |")
    print("|---|---|---|---|")
    print(f"| {tokens} | {totals[0] / tokens:.4f} | {totals[1] / tokens:.4f} | {largest:g} |")


if __name__ == "__main__":
    main()
