"""Training speed: FoT against standard training on the same tokens, ZeRO stages side by side, the checkpoint's pause.

    python -m benchmarks.training            # CPU: one thread a process, two processes for ZeRO
    python -m benchmarks.training --gpu      # one GPU: tokens/s and MFU of a 1B LLaMA in bfloat16

What runs is the training loop's own code (`make_engine`, `batch_loss`, `take_step`, `Checkpoints`) on random tokens:
whole steps with clipping and AdamW. Configurations of the same tokens take turns within one process, so that all meet
the same state of the machine; figures are medians. On CPU: 4 layers, d_model 256, 8 heads, vocabulary 512, memory layer
2, float32, a step of 16 rows of 512 tokens. On a GPU: 16 layers, d_model 2048, 32 heads, 8 key/value heads, vocabulary
32000, memory layers 4, 8, 12, ZeRO 1, activation checkpointing; a step of 16 rows of 2048 tokens (4 documents), and for
d = 64, which takes 64 documents at once, of 128 rows of 512. MFU counts no recomputation (`jobs/train/estimate.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import default_device, heading
from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.training import CheckpointSettings as CheckpointSettings
from jobs.config.training import Objective, Training
from jobs.models.shape import Shape
from jobs.train.estimate import peak_flops, step_flops
from jobs.train.objective import batch_loss
from pipelines.batches.loader import TensorBatch

CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
CPU_SHAPE |= {"vocab_size": 512, "mem_layers": [2], "num_key_value_heads": 8}
GPU_SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32}
GPU_SHAPE |= {"vocab_size": 32000, "mem_layers": [4, 8, 12], "num_key_value_heads": 8, "tie_word_embeddings": False}
TABLE = [[0, 0], [1, 1], [2, 1], [3, 0]]
FOT_TABLE = ({"kind": "fot", "segments": TABLE}, 4)
CPU = {  # configurations by tokens of a context: objective, groups
    512: {
        "standard": ({"kind": "standard"}, 16),
        "fot, LongLLaMA 3B's table": FOT_TABLE,
        "fot, d = 4": ({"kind": "fot", "d": 4, "contexts": 4}, 4),
        "fot, d = 8": ({"kind": "fot", "d": 8, "contexts": 2}, 8),
        "memorizing": ({"kind": "memorizing", "contexts": 4}, 4),
        "transformer_xl": ({"kind": "transformer_xl", "contexts": 4}, 4),
    }
}
GPU = {
    2048: {
        "standard": ({"kind": "standard"}, 16),
        "fot, LongLLaMA 3B's table": FOT_TABLE,
        "fot, d = 3": ({"kind": "fot", "d": 3, "contexts": 4}, 4),
    },
    512: {
        "standard": ({"kind": "standard"}, 128),
        "fot, d = 64": ({"kind": "fot", "d": 64, "contexts": 2}, 64),
    },
}
STAGES = ({"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3})
STAGES += ({"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 2, "activation_checkpointing": True})
STAGES += ({"zero_stage": 2, "dtype": "bfloat16"},)


def training(objective: dict[str, Any], groups: int, context: int, **deepspeed: Any) -> Training:
    return Training.model_validate(
        {
            "objective": {**objective, "context": context},
            "steps": 1,
            "batch": {"micro_batches": 1, "groups": groups},
            "deepspeed": deepspeed,
        }
    )


def random_batch(objective: Objective, groups: int, shape: dict[str, Any]) -> TensorBatch:
    contexts = objective.contexts
    ids = torch.randint(0, shape["vocab_size"], (groups * contexts, objective.context))
    return TensorBatch(
        input_ids=ids,
        labels=ids.roll(-1, 1),
        document_ids=torch.arange(groups).repeat_interleave(contexts)[:, None].expand_as(ids),
        group=[group for group in range(groups) for _ in range(contexts)],
        segment=list(range(contexts)) * groups,
        related=[[one == other for other in range(groups)] for one in range(groups)],
        first=0,
    )


def llama(shape: dict[str, Any], context: int, dtype: torch.dtype, device: torch.device) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    return FotLlamaForCausalLM(FotLlamaConfig(max_position_embeddings=context, **shape)).to(device, dtype).train()


def step_seconds(engine: Any, settings: Training, batch: TensorBatch) -> float:
    """A whole step: forward, backward, clipping, optimizer."""
    from jobs.train.engine import take_step

    batch = batch.to(engine.device)
    began = time.perf_counter()
    engine.backward(batch_loss(engine, batch, settings.objective, 0, 0, batch.labels.numel()))
    take_step(engine)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def objectives(gpu: bool, rounds: int) -> None:
    """Steps of the same tokens under every objective, in turns; those of another number of tokens have a standard of
    their own."""
    import deepspeed

    from jobs.train.engine import make_engine

    shape = GPU_SHAPE if gpu else CPU_SHAPE
    print("| objective | rows x tokens | s a step | tokens/s | of standard's tokens/s | MFU |")
    print("|---|---|---|---|---|---|", flush=True)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    with tempfile.TemporaryDirectory() as directory:
        meeting = f"file://{directory}/meet"
        torch.distributed.init_process_group("nccl" if gpu else "gloo", init_method=meeting, rank=0, world_size=1)
        for context, configurations in (GPU if gpu else CPU).items():
            made = {name: training(objective, groups, context) for name, (objective, groups) in configurations.items()}
            dtype = "bfloat16" if gpu else "float32"
            first = training({"kind": "standard"}, 1, context, zero_stage=1 if gpu else 0, dtype=dtype)
            model = llama(shape, context, getattr(torch, dtype), torch.device("cuda" if gpu else "cpu"))
            if gpu:
                model.gradient_checkpointing_enable()
            engine = make_engine(model, first, 1)
            batches = {name: random_batch(one.objective, one.batch.groups, shape) for name, one in made.items()}
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for turn in range(rounds + 1):
                for name, settings in made.items():
                    spent = step_seconds(engine, settings, batches[name])
                    if turn:  # the first warms up
                        seconds[name].append(spent)
            standard = statistics.median(seconds["standard"])
            peak = peak_flops(torch.cuda.get_device_name(), dtype) if gpu else None
            for name, settings in made.items():
                median, tokens = statistics.median(seconds[name]), batches[name].input_ids.numel()
                flops = step_flops(Shape.of(model.config.to_dict()), settings)
                mfu = f"{flops / median / peak:.1%}" if peak else "-"
                rows = f"{tokens // context} x {context}"
                ratio = standard / median
                print(f"| {name} | {rows} | {median:.3f} | {tokens / median:,.0f} | {ratio:.2f} | {mfu} |", flush=True)
            engine.destroy()
            del engine, model
            deepspeed.get_accelerator().empty_cache()
        torch.distributed.destroy_process_group()


def stages(rounds: int) -> None:
    """One optimizer step and one checkpoint on two processes, stage by stage; each stage has processes of its own."""
    print("\n| ZeRO, two processes | s a step | of stage 0 | checkpoint's pause s | written in s | MB a rank |")
    print("|---|---|---|---|---|---|")
    first = 0.0
    for settings in STAGES:
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "benchmarks.training", "--rank", directory, json.dumps(settings)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ROUNDS": str(rounds)}
            ranks = [
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                for rank in range(2)
            ]
            errors = [process.communicate()[1] for process in ranks]
            if any(process.returncode for process in ranks):
                raise SystemExit(errors[0].decode())
            found = json.loads((Path(directory) / "figures.json").read_text())
        first = first or found["step"]
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(
            f"| {name} | {found['step']:.3f} | {found['step'] / first:.2f} | {found['pause']:.3f} "
            f"| {found['write']:.3f} | {found['bytes'] / 2e6:.1f} |"
        )


def rank(directory: Path, settings: dict[str, Any]) -> None:
    """One of the two processes."""
    from jobs.train.checkpoints import Checkpoints
    from jobs.train.engine import make_engine, take_step

    torch.set_num_threads(1)
    number = int(os.environ["RANK"])
    meeting = f"file://{directory}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=2)
    objective, groups = FOT_TABLE
    made = training(objective, groups // 2, 512, **settings)
    dtype = getattr(torch, made.deepspeed.dtype)
    model = llama(CPU_SHAPE, 512, dtype, torch.device("cpu"))
    if made.deepspeed.activation_checkpointing:
        model.gradient_checkpointing_enable()
    engine = make_engine(model, made, 1)
    batch = random_batch(made.objective, made.batch.groups, CPU_SHAPE)
    checkpoints = Checkpoints(str(directory / "checkpoints"), {}, CheckpointSettings(), directory)
    seconds, pauses, writes = [], [], []
    for turn in range(int(os.environ["ROUNDS"]) + 1):
        torch.distributed.barrier()
        began = time.perf_counter()
        engine.backward(batch_loss(engine, batch, made.objective, 0, 0, batch.labels.numel()))
        take_step(engine)
        seconds.append(time.perf_counter() - began)
        checkpoints.save(engine, turn + 1, {})
        checkpoints.wait()
        timings = checkpoints.timings()
        pauses.append(timings["checkpoint_pause_seconds"])
        writes.append(timings["checkpoint_write_seconds"])
    if number == 0:
        newest = max((directory / "checkpoints").glob("step-*"))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        median = statistics.median
        figures = {"step": median(seconds[1:]), "pause": median(pauses[1:]), "write": median(writes[1:]), "bytes": size}
        (directory / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the 1B shape on one GPU")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each configuration")
    parser.add_argument("--rank", nargs=2, metavar=("DIRECTORY", "SETTINGS"), help="one process, for its own use")
    asked = parser.parse_args()
    if asked.rank:
        rank(Path(asked.rank[0]), json.loads(asked.rank[1]))
        return
    if asked.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU on this machine")
    torch.set_num_threads(1)
    print(heading(default_device()), end="\n\n")
    objectives(asked.gpu, asked.rounds)
    if not asked.gpu:
        stages(asked.rounds)


if __name__ == "__main__":
    main()
