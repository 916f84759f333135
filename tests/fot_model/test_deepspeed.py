"""DeepSpeed ZeRO-3 partitions the parameters of a FoT model; training on two ranks equals one process without it.

The file is also the script that starts the ranks.
"""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan
from fot_model.cache_file import sampled_fingerprint

STEPS, WORLD = 5, 2
PLAN = cross_batch_plan([0, 0, 1, 1], [0, 1, 0, 1], [[True, False], [False, True]], [(0, 0), (1, 1)])
IDS = torch.randint(0, 40, (STEPS, WORLD, 4, 8), generator=torch.Generator().manual_seed(1))  # a micro-batch a rank


def fresh() -> tuple[FotLlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        mem_layers=[1],
        mem_gate=True,
        initializer_range=0.3,
    )
    model = FotLlamaForCausalLM(config).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: torch.nn.Module, batch: Tensor, **how: bool) -> Tensor:
    return model(batch, labels=batch, plan=PLAN, use_cache=False, **how).loss


def without_deepspeed() -> list[float]:
    model, optimizer = fresh()
    losses = []
    for micro_batches in IDS:
        loss = sum(loss_of(model, batch, skip_logits=False) for batch in micro_batches) / WORLD
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_rank(rank: int, output: str) -> None:
    """ZeRO-3, with activations recomputed."""
    import deepspeed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=120))
    model, optimizer = fresh()
    model.gradient_checkpointing_enable()
    whole = sampled_fingerprint(model)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    partitioned = all(hasattr(parameter, "ds_id") for parameter in engine.module.parameters())
    assert partitioned, "ZeRO-3 left a parameter whole"
    assert sampled_fingerprint(engine.module) == whole, "memory files would be those of another model"
    assert type(engine.module.lm_head.weight) is torch.nn.Parameter, "the loss would hold all logits"
    losses = []
    for micro_batches in IDS:
        loss = loss_of(engine, micro_batches[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / WORLD)
    if rank == 0:
        Path(output).write_text(json.dumps(losses))


def test_zero_3_with_gradient_checkpointing_on_two_ranks_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    environment |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    output = tmp_path / "losses.json"
    subprocess.run([sys.executable, __file__, str(output)], env=environment, check=True, timeout=300)
    expected = without_deepspeed()
    assert len(set(expected)) == STEPS
    assert json.loads(output.read_text()) == pytest.approx(expected, abs=1e-5)


if __name__ == "__main__":
    import deepspeed  # noqa: F401 - once for both ranks, which are forked

    ranks = [get_context("fork").Process(target=run_rank, args=(rank, sys.argv[1])) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
