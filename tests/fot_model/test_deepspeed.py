"""DeepSpeed ZeRO-3 partitions the parameters of a FoT model; training on two ranks equals one process without it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 5
WORKER = """
import json, sys
import deepspeed, torch
from fot_model import FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan
from fot_model.cache_file import sampled_fingerprint

output, stage, checkpointing, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
config = FotLlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8, mem_layers=[1], mem_gate=True, initializer_range=0.3,
)
plan = cross_batch_plan([0, 0, 1, 1], [0, 1, 0, 1], [[True, False], [False, True]], [(0, 0), (1, 1)])
ids = torch.randint(0, 40, (steps, 2, 4, 8), generator=torch.Generator().manual_seed(1))  # two micro-batches a step

def loss_of(model, batch, **how):
    return model(batch, labels=batch, plan=plan, use_cache=False, **how).loss

losses = []
model = FotLlamaForCausalLM(config).train()
if checkpointing:
    model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
if stage < 0:  # plain torch
    for step in range(steps):
        loss = sum(loss_of(model, batch, skip_logits=False) for batch in ids[step]) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
else:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, whole = torch.distributed.get_rank(), sampled_fingerprint(model)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31,
    })[0]
    partitioned = all(hasattr(parameter, "ds_id") for parameter in engine.module.parameters())
    assert partitioned, "ZeRO-3 left a parameter whole"
    assert sampled_fingerprint(engine.module) == whole, "memory files would be those of another model"
    assert type(engine.module.lm_head.weight) is torch.nn.Parameter, "the loss would hold all logits"
    for step in range(steps):
        loss = loss_of(engine, ids[step, rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    if rank:
        sys.exit()
with open(output, "w") as file:
    json.dump(losses, file)
"""


def losses(tmp_path: Path, stage: int, checkpointing: bool) -> list[float]:
    script, output = tmp_path / "worker.py", tmp_path / f"losses{stage}.json"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = 1 if stage < 0 else 2
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    environment |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), str(output), str(stage), str(checkpointing), str(STEPS)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(output.read_text())


def test_zero_3_with_gradient_checkpointing_on_two_ranks_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    expected = losses(tmp_path, -1, checkpointing=False)
    assert len(set(expected)) == STEPS
    assert losses(tmp_path, 3, checkpointing=True) == pytest.approx(expected, abs=1e-5)
