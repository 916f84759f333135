"""Decoding with M tokens in memory, against a LLaMA of the same size that attends to all of them in every layer.

    python -m benchmarks.decoding        # one thread on CPU; a GPU where there is one

Model: 8 layers (memory layer 5), d_model 256, 8 heads, local context 512, float32. The memory and the caches are filled
with random keys and values; a figure is the median time of 16 tokens of one row after 3 to warm up. `dense`, `top-128`:
FotCache with such a memory. `LLaMA static`, `LLaMA dynamic`: transformers' caches with M tokens in all layers (the
dynamic one copies itself for every token, as transformers does). Megabytes are computed from shapes: keys and values
of M tokens and of the local contexts. `append`: microseconds to add one token to a memory that has grown from nothing
to M tokens, one at a time, in all.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, StaticCache

from benchmarks.machine import default_device, heading
from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, TopKMemory

LOCAL, TOKENS, WARM_UP = 512, 16, 3
SIZES = [2**power for power in range(12, 19)]
HEADS, HEAD_SIZE, LAYERS, MEM_LAYER = 8, 32, 8, 5


def make_model(device: torch.device) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=512,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=max(SIZES) + LOCAL,
        local_context=LOCAL,
        mem_layers=[MEM_LAYER],
    )
    return FotLlamaForCausalLM(config).to(device).eval()


def random_pair(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, HEADS, tokens, HEAD_SIZE)
    return torch.randn(shape, device=device), torch.randn(shape, device=device)


def fot_cache(model: FotLlamaForCausalLM, memory: DenseMemory, tokens: int) -> FotCache:
    """The memory full of random tokens, and half a local context read."""
    cache = FotCache(model.config, memory)
    memory.append(MEM_LAYER, *random_pair(tokens, model.device))
    model(torch.zeros(1, LOCAL // 2, dtype=torch.long, device=model.device), past_key_values=cache, logits_to_keep=1)
    return cache


def full_cache(model: FotLlamaForCausalLM, cache: Cache, tokens: int) -> Cache:
    for layer in range(LAYERS):
        cache.update(*random_pair(tokens, model.device), layer)
    return cache


def seconds_a_token(model: FotLlamaForCausalLM, cache: Cache) -> float:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(WARM_UP + TOKENS):
        began = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def append_microseconds(tokens: int, device: torch.device) -> float:
    memory, (keys, values) = DenseMemory(), random_pair(1, device)
    began = time.perf_counter()
    for _ in range(tokens):
        memory.append(MEM_LAYER, keys, values)
    return (time.perf_counter() - began) / tokens * 1e6


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    device = default_device()
    model = make_model(device)
    plain = copy.deepcopy(model)
    plain.config.mem_layers = []
    for layer in plain.model.layers:
        layer.self_attn.is_memory_layer = False
    caches: dict[str, Callable[[int], Cache]] = {
        "dense": lambda tokens: fot_cache(model, DenseMemory(), tokens),
        "top-128": lambda tokens: fot_cache(model, TopKMemory(128), tokens),
        "static": lambda tokens: full_cache(plain, StaticCache(plain.config, tokens + TOKENS + WARM_UP), tokens),
        "dynamic": lambda tokens: full_cache(plain, DynamicCache(config=plain.config), tokens),
    }
    print(heading(device), end="\n\n")
    print("| M | dense ms | top-128 ms | LLaMA static ms | LLaMA dynamic ms | memory MB | LLaMA cache MB | append us |")
    print("|---|---|---|---|---|---|---|---|")
    pair_bytes = 2 * HEADS * HEAD_SIZE * 4
    for tokens in SIZES:
        times = {
            name: seconds_a_token(model if name in ("dense", "top-128") else plain, make(tokens)) * 1e3
            for name, make in caches.items()
        }
        memory_mb, cache_mb = ((tokens + LOCAL * n) * pair_bytes / 1e6 for n in (LAYERS, 0))
        print(
            f"| {tokens // 1024}k | {times['dense']:.1f} | {times['top-128']:.1f} | {times['static']:.1f} "
            f"| {times['dynamic']:.1f} | {memory_mb:.0f} | {cache_mb * LAYERS:.0f} "
            f"| {append_microseconds(tokens, device):.1f} |"
        )


if __name__ == "__main__":
    main()
