"""Estimates of a step's work against torch's FLOP counter; devices and their peaks."""

import subprocess
import sys

import pytest
import torch
from fixtures.estimate import OPEN_LLAMA_3B, PARTS, SMALL, TABLE, fot, part_of, training
from torch.utils.flop_counter import FlopCounterMode

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, c_prev_plan, cross_batch_plan
from jobs.models.backward import Backward
from jobs.models.shape import Shape
from jobs.train.estimate import (
    DEVICES,
    contexts_seen,
    find_device,
    peak_flops,
    step_flops,
    tokens_per_step,
)


def fused_forward(q: tuple, k: tuple, *_: object, **__: object) -> int:
    """Of shapes [B, H, L, D] and [B, Hk, M, D]."""
    B, H, L, D = q
    return 4 * B * H * L * D * k[2]


def fused_backward(_grad: tuple, q: tuple, k: tuple, *_: object, **__: object) -> int:
    return 2 * fused_forward(q, k)


FUSED = {  # torch counts its CUDA kernels alone; of a causal square it, too, counts all
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: fused_backward,
}


def counted_flops(attention: str, R: int, L: int, plan: torch.Tensor | None) -> tuple[int, Shape]:
    config = FotLlamaConfig(**SMALL, attn_implementation=attention)
    model = FotLlamaForCausalLM(config).train()
    ids = torch.randint(0, 96, (R, L))
    given = {} if plan is None else {"plan": plan}
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        model(ids, use_cache=False, **given).logits.sum().backward()
    return counter.get_total_flops(), Shape.of(config.to_dict())


def masked_half(shape: Shape, tokens: int, L: int) -> float:
    """FLOPs of the pairs that the causal mask hides."""
    return tokens * shape.num_hidden_layers * 12 * shape.queries * (L - 1) / 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_standard_step_are_those_that_torch_counts_less_the_masked_half(attention: str) -> None:
    made = training({"kind": "standard", "context": 32}, groups=4)
    counted, shape = counted_flops(attention, 4, 32, None)
    assert step_flops(shape, made) == counted - masked_half(shape, 4 * 32, 32)


@pytest.mark.parametrize("objective", [fot(), fot(segments=None, d=2, contexts=3)], ids=["table", "d"])
def test_flops_of_a_fot_step_are_those_that_torch_counts_less_the_masked_half(objective: dict) -> None:
    group, segment, related = [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [[True, False], [False, True]]
    table = objective["segments"]
    plan = cross_batch_plan(group, segment, related, table) if table else c_prev_plan(group, segment, related, 2)
    counted, shape = counted_flops("sdpa", 6, 32, plan)
    assert step_flops(shape, training(objective)) == pytest.approx(counted - masked_half(shape, 6 * 32, 32), rel=1e-12)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_flops_of_a_part_are_those_that_torch_counts_less_the_masked_half(part: dict, tied: bool) -> None:
    made, config = training(fot()), FotLlamaConfig(**SMALL, attn_implementation="sdpa", tie_word_embeddings=tied)
    made = made.model_validate({**made.model_dump(), **part})
    model = FotLlamaForCausalLM(config).train()
    part_of(model, made)
    plan = cross_batch_plan([0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [[True, False], [False, True]], TABLE)
    ids = torch.randint(0, 96, (6, 32))
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        model(ids, use_cache=False, plan=plan).logits.sum().backward()
    shape = Shape.of(config.to_dict())
    back = Backward.of(shape, made)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert back.trained_parameters == sum(parameter.numel() for parameter in trained)
    assert back.parameters == sum(parameter.numel() for parameter in model.parameters())
    hidden = sum(12 if back.reaches_attention(layer) else 4 for layer in range(3)) * shape.queries * 31 / 2
    assert step_flops(shape, made) == pytest.approx(counter.get_total_flops() - 6 * 32 * hidden, rel=1e-12)
    assert step_flops(shape, made) < step_flops(shape, training(fot()))


def test_what_is_not_differentiated_takes_two_thirds() -> None:
    shape, local = Shape.of(SMALL), {"context": 32, "contexts": 3}
    plain = step_flops(shape, training({"kind": "standard", "context": 32}, groups=6))
    far = step_flops(shape, training(fot(segments=None, d=1, contexts=3))) - plain
    previous = step_flops(shape, training({"kind": "transformer_xl", **local})) - plain
    past = step_flops(shape, training({"kind": "memorizing", "mem_layers": [1], **local})) - plain
    assert previous == pytest.approx(3 * far * 2 / 3)  # all three layers see the previous context
    assert past == pytest.approx(far * 2 / 3 * 3 / 2)  # 0, 1, 2 contexts where d = 1 sees 0, 1, 1


@pytest.mark.parametrize(
    ("objective", "mean"),
    [
        ({"kind": "standard", "context": 8}, 0),
        ({"kind": "fot", "context": 8}, 2),  # LongLLaMA 3B: 0, 2, 3, 3
        ({"kind": "fot", "context": 8, "d": 2, "contexts": 5}, 1.6),
        ({"kind": "fot", "context": 8, "d": {"first": 1, "until": 25, "then": 2}, "contexts": 2}, 0.875),
        ({"kind": "fot", "context": 8, "d": {"first": 1, "until": 900, "then": 2}, "contexts": 2}, 0.5),
        ({"kind": "fot", "context": 8, "d": {"of": [1, 2]}, "contexts": 2}, 0.75),
        ({"kind": "memorizing", "context": 8, "contexts": 4}, 1.5),
        ({"kind": "transformer_xl", "context": 8, "contexts": 4}, 0.75),
    ],
)
def test_contexts_seen_on_average(objective: dict, mean: float) -> None:
    assert contexts_seen(training(objective).objective, 100) == pytest.approx(mean)


def test_flops_of_a_step_at_a_known_d_follow_it() -> None:
    switch = training(fot(segments=None, d={"first": 1, "until": 50, "then": 2}, contexts=2))
    shape = Shape.of(SMALL)
    first, then = step_flops(shape, switch, 0.5), step_flops(shape, switch, 1.0)
    assert first < step_flops(shape, switch) < then
    assert (first + then) / 2 == pytest.approx(step_flops(shape, switch))


def test_longllama_reads_a_quarter_of_a_million_tokens_a_step() -> None:
    made = training({"kind": "fot", "context": 2048}, groups=2, micro_batches=16)
    assert tokens_per_step(made) == 256 * 1024
    # 6 N a token and a little for attention: 6 x 3.32 B x 262144 = 5.2e15
    assert step_flops(Shape.of(OPEN_LLAMA_3B), made) == pytest.approx(5.62e15, rel=0.005)


@pytest.mark.parametrize(
    ("name", "device", "half"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", "H100 NVL", 835e12),
        ("NVIDIA H200", "H200 SXM", 989e12),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", 312e12),
        ("NVIDIA L40S", "L40S", 362e12),
        ("NVIDIA L4", "L4", 121e12),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("a100", "A100 80GB", 312e12),
    ],
)
def test_a_device_is_found_by_torchs_name(name: str, device: str, half: float) -> None:
    found = find_device(name)
    assert found is not None
    assert found.name == device
    assert peak_flops(name, "bfloat16") == peak_flops(name, "float16") == half
    assert peak_flops(name, "float32") == 1e12 * found.single < half


@pytest.mark.parametrize(
    "name",
    ["CPU", "", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G"],
)
def test_the_peak_of_another_device_is_not_guessed(name: str) -> None:
    assert find_device(name) is None
    assert peak_flops(name, "bfloat16") is None


def test_every_device_is_found_by_its_own_name() -> None:
    assert [find_device(device.name) for device in DEVICES] == list(DEVICES)


def test_the_estimates_need_no_torch() -> None:
    code = "import sys, jobs.train.estimate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
