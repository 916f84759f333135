"""What a full local context costs: half of it moved to memory, against all of it at once (as LongLLaMA's code does).

    python -m benchmarks.windows MODEL TEXT...

MODEL: a FoT checkpoint directory; TEXT: text files, each read as one document from an empty memory, one thread. Prints
perplexity by place in the window of the reader that empties its local context when it is full, by eighths, and on the
same tokens that of ours.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from benchmarks.machine import heading
from fot_model import FotCache, FotLlamaForCausalLM

EIGHTHS = 8


def losses(model: FotLlamaForCausalLM, ids_1N: Tensor, empties: bool) -> Tensor:
    """Loss [N - 1] (nats) of every token but the first."""
    cache, logits = FotCache(model.config), []
    window = model.config.window
    for part in ids_1N.split(window, dim=1):
        logits.append(model(part, past_key_values=cache, last_context_length=window if empties else None).logits)
        if empties:
            cache.flush()
    return functional.cross_entropy(torch.cat(logits, dim=1)[0, :-1], ids_1N[0, 1:], reduction="none")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = FotLlamaForCausalLM.from_pretrained(asked.model).eval()
    model.config.last_context_length = None
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    window = model.config.window
    sums = {empties: torch.zeros(EIGHTHS, dtype=torch.float64) for empties in (True, False)}
    counts = torch.zeros(EIGHTHS)
    for path in asked.text:
        ids_1N = tokenizer(path.read_text(), return_tensors="pt").input_ids[:, : 64 * window]
        place_N = torch.arange(ids_1N.shape[1] - 1) % window * EIGHTHS // window
        later_N = torch.arange(ids_1N.shape[1] - 1) >= window  # the first window is the same for both
        counts += torch.bincount(place_N[later_N], minlength=EIGHTHS)
        for empties, total in sums.items():
            total += torch.bincount(
                place_N[later_N], losses(model, ids_1N, empties)[later_N].double(), minlength=EIGHTHS
            )
    print(heading(torch.device("cpu")), end="\n\n")
    print(f"| eighth of the window ({window} tokens) | " + " | ".join(map(str, range(1, EIGHTHS + 1))) + " | all |")
    print("|---" * (EIGHTHS + 2) + "|")
    for empties, name in ((True, "all at once"), (False, "half at a time")):
        cells = [*(sums[empties] / counts).tolist(), float(sums[empties].sum() / counts.sum())]
        print(f"| {name} | " + " | ".join(f"{math.exp(cell):.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
