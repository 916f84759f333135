"""The loss without all logits: peak memory and time of a training step, forward and backward, beside the usual loss.

    python -m benchmarks.loss MODEL [--rows 8] [--context 512]

MODEL: a Hugging Face directory (SmolLM2-135M: 49,152 tokens); beside it a LLaMA of its width, four layers deep, with
Llama 3's vocabulary of 128,256, made on the spot. Float32, the rows in groups of four that see one another (LongLLaMA
3B's table), on one thread; with and without activation checkpointing, all parameters trained. Each case is a process
of its own: its peak resident memory, less what it had with model and gradients allocated; CPU seconds of a step, the
better of two.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch

from benchmarks.machine import heading
from fot_model import FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan, default_mem_layers

TABLE = [(0, 0), (1, 1), (2, 1), (3, 0)]
GB = 1e9


def build(model: str, llama3: bool, checkpointing: bool, context: int) -> FotLlamaForCausalLM:
    config = FotLlamaConfig.from_pretrained(model)
    if llama3:
        config.vocab_size, config.num_hidden_layers = 128_256, 4
    config.mem_layers, config.local_context = default_mem_layers(config.num_hidden_layers), context
    torch.manual_seed(0)
    made = FotLlamaForCausalLM(config) if llama3 else FotLlamaForCausalLM.from_pretrained(model, config=config)
    if checkpointing:
        made.gradient_checkpointing_enable()
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return made.train()


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(model: str, llama3: bool, checkpointing: bool, skips: bool, rows: int, context: int) -> None:
    """One case, as a line of JSON."""
    torch.set_num_threads(1)
    made = build(model, llama3, checkpointing, context)
    groups = rows // len(TABLE)
    apart = [[one == other for other in range(groups)] for one in range(groups)]
    group = [number for number in range(groups) for _ in TABLE]
    plan = cross_batch_plan(group, list(range(len(TABLE))) * groups, apart, TABLE)
    ids = torch.randint(0, made.config.vocab_size, (rows, context))
    before, seconds = peak_bytes(), []
    for _ in range(2):
        began = time.process_time()
        loss = made(ids, labels=ids, plan=plan, skip_logits=skips).loss
        loss.backward()
        seconds.append(time.process_time() - began)
    found = {"peak": peak_bytes(), "step": peak_bytes() - before, "seconds": min(seconds), "loss": loss.item()}
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        llama3, checkpointing, skips = json.loads(arguments.case)
        measure(arguments.model, llama3, checkpointing, skips, arguments.rows, arguments.context)
        return
    torch.set_num_threads(1)
    print(heading(torch.device("cpu")), end="\n\n")
    print(f"{arguments.rows * arguments.context} tokens\n")
    print("| model | activation checkpointing | logits | peak GB of the process | of the step | CPU s a step | loss |")
    print("|---|---|---|---|---|---|---|")
    for llama3 in (False, True):
        for checkpointing in (True, False):
            for skips in (False, True):
                case = ["--case", json.dumps([llama3, checkpointing, skips])]
                command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], *case]
                output = subprocess.run(command, check=True, capture_output=True, env=os.environ, text=True).stdout
                found = json.loads(output.splitlines()[-1])
                cells = (
                    "Llama 3's vocabulary" if llama3 else os.path.basename(arguments.model),
                    "on" if checkpointing else "off",
                    "some at a time" if skips else "all",
                    f"{found['peak'] / GB:.2f}",
                    f"{found['step'] / GB:.2f}",
                    f"{found['seconds']:.1f}",
                    f"{found['loss']:.5f}",
                )
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
