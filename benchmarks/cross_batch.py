"""CrossBatch against gathering: a training step's peak memory and time, and the memory layer's time alone.

    python -m benchmarks.cross_batch        # one thread on CPU; a GPU where there is one

Model: 4 layers (memory layer 2), d_model 256, 8 heads; a step of 8 rows of 512 tokens, each seeing the 7 others,
forward and backward, float32 (bfloat16 on a GPU). `merged` is what the model does (on a GPU FlexAttention); `gather +
SDPA` and `gather + matrix` hold the additional keys of all rows in one tensor, the latter the score matrix too. Times
are the best of 5 runs. Peaks are above what was there before the step; on CPU they are resident memory, in a process of
its own whose allocator returns every tensor's memory at once (MALLOC_MMAP_THRESHOLD_).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.machine import default_device, heading
from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from fot_model import layer as layer_module

ROWS, CONTEXT, RUNS = 8, 512, 5
VARIANTS = ("plain causal", "merged", "gather + SDPA", "gather + matrix")


def gathered(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, plan: Tensor) -> tuple[Tensor, ...]:
    """Local and additional keys, values [R, H, (1 + d) * L, D] and the mask [R, 1, L, (1 + d) * L]."""
    R, _, L, _ = q.shape

    def joined(local: Tensor, far: Tensor) -> Tensor:
        return torch.cat([local, far[plan].transpose(1, 2).flatten(2, 3)], dim=2)

    causal = torch.ones(L, L, dtype=torch.bool, device=q.device).tril().expand(R, L, L)
    additional = torch.ones(R, L, plan.shape[1] * L, dtype=torch.bool, device=q.device)
    return joined(k, far_k), joined(v, far_v), torch.cat([causal, additional], dim=2)[:, None]


def gather_sdpa(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, plan: Tensor, scale: float, *_: object, **__: object
) -> Tensor:
    keys, values, mask = gathered(q, k, v, far_k, far_v, plan.to(q.device))
    return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def gather_matrix(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, plan: Tensor, scale: float, *_: object, **__: object
):
    keys, values, mask = gathered(q, k, v, far_k, far_v, plan.to(q.device))
    return ((q @ keys.transpose(-1, -2)) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ values


def measure(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds (best of `RUNS`) and peak MB above what was there before."""
    run()  # warm-up: buffers that stay, compilation
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew
        before = resident("VmRSS")
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return {"seconds": min(seconds), "peak_mb": (peak - before) / 1e6}


def resident(what: str) -> float:
    """Bytes, from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return float(line.split()[1]) * 1024


def one(variant: str, part: str) -> dict[str, float]:
    """A figure, in this process. `part`: "step" of the model, or its memory "layer" alone."""
    device = default_device()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        mem_layers=[2],
    )
    model = FotLlamaForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ids = torch.randint(0, 512, (ROWS, CONTEXT), device=device)
    plan = torch.tensor([[other for other in range(ROWS) if other != row] for row in range(ROWS)])
    if variant == "plain causal":
        plan = plan[:, :0]
    attention = {"gather + SDPA": gather_sdpa, "gather + matrix": gather_matrix}.get(variant)
    if attention is not None:
        mock.patch.object(layer_module, "cross_batch_attention", attention).start()
    if part == "step":

        def run() -> None:
            model.zero_grad()
            model(ids, labels=ids, plan=plan if plan.shape[1] else None, use_cache=False).loss.backward()

        return measure(run, device)
    layer = model.model.layers[2].self_attn
    hidden = torch.randn(ROWS, CONTEXT, 256, device=device, dtype=model.dtype)
    angles = model.model.rotary_emb(hidden, torch.arange(CONTEXT, device=device)[None])
    cross_batch = model._cross_batch(plan, "fot", None, ROWS, CONTEXT)

    def run_layer() -> None:
        given = hidden.clone().requires_grad_()
        layer(given, angles, cross_batch=cross_batch)[0].sum().backward()

    return measure(run_layer, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "PART"), help="one figure, as JSON")
    asked = parser.parse_args().one
    if asked:
        print(json.dumps(one(*asked)))
        return
    torch.set_num_threads(1)
    print(heading(default_device()), end="\n\n")
    print("| attention | step s | step peak MB | peak / plain | memory layer s | layer peak MB | layer s / merged |")
    print("|---|---|---|---|---|---|---|")
    figures = {(variant, part): child(variant, part) for variant in VARIANTS for part in ("step", "layer")}
    for variant in VARIANTS:
        step, layer = figures[variant, "step"], figures[variant, "layer"]
        print(
            f"| {variant} | {step['seconds']:.2f} | {step['peak_mb']:.0f} "
            f"| {step['peak_mb'] / figures['plain causal', 'step']['peak_mb']:.2f} | {layer['seconds']:.2f} "
            f"| {layer['peak_mb']:.0f} | {layer['seconds'] / figures['merged', 'layer']['seconds']:.1f} |"
        )


def child(variant: str, part: str) -> dict[str, float]:
    """Both figures, each from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cross_batch", "--one", variant, part]
    figures = {}
    for name, extra in (("seconds", {}), ("peak_mb", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **extra})
        figures[name] = json.loads(done.stdout.splitlines()[-1])[name]
    return figures


if __name__ == "__main__":
    main()
