"""Estimates of memory against what DeepSpeed holds and torch allocates."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.estimate import OPEN_LLAMA_3B, PARTS, SMALL, TABLE, count_of, fot, part_of, training
from torch.distributed._tools.mem_tracker import MemTracker

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan
from jobs.config.training import Resources
from jobs.models.shape import Shape
from jobs.train.estimate import (
    BUCKET,
    device_memory,
    loss_bytes,
)


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
