"""The estimates against the real thing: the model, torch's FLOP counter and memory tracker, DeepSpeed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, c_prev_plan, cross_batch_plan, default_mem_layers
from jobs.config.training import Resources, Training
from jobs.models.backward import Backward
from jobs.models.layers import gated_layers, seeing_layers
from jobs.models.shape import Shape, parameter_sizes
from jobs.models.trained import lora_modules, trained_names
from jobs.train.estimate import (
    BUCKET,
    DEVICES,
    contexts_seen,
    device_memory,
    find_device,
    loss_bytes,
    peak_flops,
    step_flops,
    tokens_per_step,
)

OPEN_LLAMA_3B = {
    "vocab_size": 32000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mem_layers": [1],
}
TABLE = [[0, 0], [1, 1], [2, 1]]


def count_of(shape: Shape) -> int:
    return sum(parameter_sizes(shape).values())


def training(
    objective: dict, steps: int = 100, groups: int = 2, micro_batches: int = 1, **deepspeed: object
) -> Training:
    return Training.model_validate(
        {
            "objective": objective,
            "steps": steps,
            "batch": {"micro_batches": micro_batches, "groups": groups},
            "deepspeed": deepspeed,
        }
    )


def fot(context: int = 32, **changes: object) -> dict:
    return {"kind": "fot", "context": context, "segments": TABLE, "mem_layers": [1], **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
        {"attention_bias": True, "num_key_value_heads": 1},
        {"mlp_bias": True},
        {"mem_layers": [0, 2], "mem_gate": True},
        {"num_hidden_layers": 1, "vocab_size": 7},
        {**OPEN_LLAMA_3B, "num_hidden_layers": 2},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_parameters_are_the_models_own(changes: dict) -> None:
    config = FotLlamaConfig(**{**SMALL, "num_key_value_heads": None, "mem_layers": None, **changes})
    with torch.device("meta"):
        model = FotLlamaForCausalLM(config)
    gated = config.mem_layers if config.mem_gate else ()
    theirs = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameter_sizes(Shape.of(config.to_dict()), gated) == theirs


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (OPEN_LLAMA_3B, 3_426_473_600),
        ({**OPEN_LLAMA_3B, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
        (
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            8_030_261_248,
        ),
    ],
    ids=["OpenLLaMA 3B", "7B", "Llama 3.1 8B"],
)
def test_parameters_of_released_models(shape: dict, count: int) -> None:
    assert count_of(Shape.of(shape)) == count


def test_a_config_without_a_size_means_what_transformers_means() -> None:
    given = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = FotLlamaForCausalLM(FotLlamaConfig(**given))
    assert count_of(Shape.of(given)) == model.num_parameters()


@pytest.mark.parametrize("layers", range(1, 81))
def test_memory_layers_by_default_are_the_models(layers: int) -> None:
    objective = training(fot(mem_layers=None)).objective
    assert seeing_layers(objective, layers) == default_mem_layers(layers)
    assert seeing_layers(training(fot(mem_layers="auto")).objective, layers) == default_mem_layers(layers)


def test_layers_that_a_probe_will_choose_are_counted_as_many() -> None:
    assert seeing_layers(training(fot(mem_layers={"auto": 5})).objective, 30) == [5, 10, 15, 20, 25]


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


PARTS = [
    {"train": "memory_attention"},
    {"train": "memory_and_above"},
    {"train": {"patterns": [r"layers\.1\.self_attn\.q_proj", r"layers\.2\.mlp\.down_proj"]}},
    {"train": {"patterns": [r"layers\.0\.mlp", "embed"]}},
    {"train": {"patterns": [r"layers\.2\..*norm"]}},
    {"train": "memory_attention", "lora": {"rank": 4}},
    {"lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}},
]


def part_of(model: torch.nn.Module, made: Training) -> None:
    """Train only what the settings say."""
    names = [name for name, _ in model.named_parameters()]
    scope = trained_names(made, names, [1])
    lora = made.lora
    if lora is not None:
        peft = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora_modules(made, scope))
        inject_adapter_in_model(peft, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scope if lora is None else ".lora_" in name)


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


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_states_at_stages_2_and_3_are_as_deepspeed_estimates_them(ranks: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    made = training(fot(), micro_batches=64, dtype="bfloat16")
    shape, resources = Shape.of(OPEN_LLAMA_3B), Resources(workers=ranks)
    count = count_of(shape)

    def states(stage: int) -> float:
        memory = device_memory(shape, made, resources, stage)
        return memory.weights + memory.gradients + memory.optimizer

    _, theirs = estimate_zero2_model_states_mem_needs(count, ranks, cpu_offload=False)
    assert states(2) == pytest.approx(theirs, abs=1)
    # At stage 3 theirs has no share of the 16-bit weights, and of gathered weights the largest layer alone.
    _, theirs, largest = estimate_zero3_model_states_mem_needs(count, 10**6, ranks, cpu_offload=False)
    assert states(3) == pytest.approx(theirs - largest + 2 * count / ranks, abs=1)
    gathered = device_memory(shape, made, resources, 3).buffers - 2 * BUCKET
    assert largest < gathered == 2 * 1e9


ENGINES = """
import gc, json, sys, time
import deepspeed, torch
from fot_model import FotLlamaConfig, FotLlamaForCausalLM

BUCKET = 10**9  # bytes: the buffer for communication is at least that large

def live():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for size in sizes.values() if size < BUCKET)

def held(stage, dtype):
    torch.manual_seed(0)
    config = FotLlamaConfig(**json.loads(sys.argv[1]))
    before = live()
    model = FotLlamaForCausalLM(config).to(dtype).train()
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16}, "steps_per_print": 2**31,
    })[0]
    ids = torch.ones(1, 4, dtype=torch.long)
    for _ in range(3):
        engine.backward(engine(ids, labels=ids, use_cache=False).loss)
        engine.step()
    engine.backward(engine(ids, labels=ids, use_cache=False).loss)  # the last of the second step
    counts = []
    for _ in range(3):  # another thread may just be letting a tensor of the backward pass go
        time.sleep(0.1)
        counts.append(live())
    return min(counts) - before

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
gc.freeze()  # what the libraries hold need not be gone through
found = {}
for stage in range(4):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        found[f"{stage} {name}"] = held(stage, dtype)
json.dump(found, open(sys.argv[2], "w"))
"""


def test_states_are_what_deepspeed_holds(tmp_path: Path) -> None:
    config = {**SMALL, "hidden_size": 128, "intermediate_size": 352, "vocab_size": 512}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    output = tmp_path / "held.json"
    command = [sys.executable, "-c", ENGINES, json.dumps(config), str(output)]
    subprocess.run(command, env={**os.environ, **address, **alone}, check=True, capture_output=True)
    shape = Shape.of(config)
    for case, held in json.loads(output.read_text()).items():
        stage, dtype = case.split()
        memory = device_memory(shape, training(fot(), dtype=dtype), Resources(), int(stage))
        states = memory.weights + memory.gradients + memory.optimizer
        # Float32 gradients are there while a step is made, not yet after the backward pass.
        of_the_step = 0 if case == "0 float32" else 4 * count_of(shape)
        assert held == pytest.approx(states - of_the_step, rel=0.02), case


def test_offloading_moves_states_to_the_host() -> None:
    shape, count = Shape.of(OPEN_LLAMA_3B), count_of(Shape.of(OPEN_LLAMA_3B))
    resources = Resources(workers=4)
    held = {
        (stage, offload): device_memory(
            shape,
            training(fot(), micro_batches=4, dtype="bfloat16", zero_stage=3, **dict.fromkeys(offload, True)),
            resources,
            stage,
        )
        for stage in range(4)
        for offload in [(), ("offload_optimizer",), ("offload_optimizer", "offload_parameters")]
    }
    assert held[2, ()].host == 4 * 2 * count  # every rank loads the weights
    assert held[0, ("offload_optimizer",)] == held[0, ()]
    assert (held[2, ("offload_optimizer",)].optimizer, held[2, ("offload_optimizer",)].gradients) == (0, 0)
    assert held[2, ("offload_optimizer",)].host == 20 * count
    assert held[1, ("offload_optimizer",)].gradients == 2 * count
    assert held[3, ("offload_optimizer", "offload_parameters")].weights == 0
    assert held[3, ("offload_optimizer", "offload_parameters")].host == 22 * count


@pytest.mark.parametrize("vocabulary", [64, 4096])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_and_logits_are_what_torch_allocates(dtype: str, checkpointing: bool, vocabulary: int) -> None:
    config = FotLlamaConfig(
        **{**SMALL, "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
    )
    model = FotLlamaForCausalLM(config).to(getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    R, L = 6, 64
    ids = torch.randint(0, vocabulary, (R, L))
    plan = cross_batch_plan([0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [[True, False], [False, True]], TABLE)

    def loss() -> torch.Tensor:
        return model(ids, shift_labels=ids, plan=plan, use_cache=False).loss

    tracker = MemTracker()
    tracker.track_external(model, *[parameter.grad for parameter in model.parameters()])
    with tracker:
        before = _total(tracker.get_tracker_snapshot("current"))
        loss().backward()
    made = training(fot(context=L), dtype=dtype, activation_checkpointing=checkpointing)
    memory = device_memory(Shape.of(config.to_dict()), made, Resources())
    allocated = _total(tracker.get_tracker_snapshot("peak")) - before
    assert allocated == pytest.approx(memory.activations + memory.peak, rel=0.06)


class Tracker(MemTracker):
    """Without hooks for gradients, which parameters that are not trained cannot have."""

    def _track_module_params_and_buffers(self, module: torch.nn.Module, install_grad_hooks: bool = True) -> tuple:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def allocated_and_planned(part: dict) -> tuple[int, float]:
    """Peak of a step's memory as torch allocates it, and as planned."""
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
    config = FotLlamaConfig(**{**SMALL, **sizes})  # logits large enough for the peak to be theirs
    made = training(fot(context=64))
    made = made.model_validate({**made.model_dump(), **part})
    model = FotLlamaForCausalLM(config).train()
    part_of(model, made)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, 4096, (6, 64))
    plan = cross_batch_plan([0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [[True, False], [False, True]], TABLE)
    tracker = Tracker()
    tracker.track_external(model, *[parameter.grad for parameter in trained])
    with tracker:
        before = _total(tracker.get_tracker_snapshot("current"))
        model(ids, shift_labels=ids, plan=plan, use_cache=False).loss.backward()
    memory = device_memory(Shape.of(config.to_dict()), made, Resources())
    return _total(tracker.get_tracker_snapshot("peak")) - before, memory.activations + memory.peak


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_keeps_less_by_what_is_planned(part: dict) -> None:
    whole, allocated = allocated_and_planned({}), allocated_and_planned(part)
    less, planned = (one - other for one, other in zip(whole, allocated, strict=True))
    assert less == pytest.approx(planned, rel=0.02, abs=0.002 * whole[1])


def _total(snapshot: dict) -> int:
    return sum(size for device in snapshot.values() for kind, size in device.items() if str(kind).endswith("Total"))


def test_ranks_that_share_a_micro_batch_hold_their_rows_and_all_far_keys() -> None:
    shape = Shape.of({**OPEN_LLAMA_3B, "num_key_value_heads": 8})
    made = training(fot(2048, mem_layers=[6, 12, 18]), groups=4, micro_batches=4, dtype="bfloat16")
    alone, shared = (device_memory(shape, made, Resources(workers=4, ranks_per_micro_batch=ranks)) for ranks in (1, 4))
    tokens = 4 * 3 * 2048
    far = 3 * 2 * 2 * shape.keys * tokens  # three layers' keys and values of the whole micro-batch
    assert alone.activations - far == pytest.approx(4 * (shared.activations - far))
    assert [alone.peak, shared.peak] == [loss_bytes(shape, tokens // ranks, 2) for ranks in (1, 4)]


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


def test_gates_are_counted_where_they_are() -> None:
    gated = {"kind": "memorizing", "context": 8, "mem_layers": [0, 2]}
    assert gated_layers(training(gated).objective, 3) == [0, 2]
    assert gated_layers(training({**gated, "gate": False}).objective, 3) == []
    assert gated_layers(training(fot()).objective, 3) == []


def test_the_estimates_need_no_torch() -> None:
    code = "import sys, jobs.train.estimate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
