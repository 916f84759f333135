"""The training loop, as every Ray Train worker runs it.

A step is M micro-batches; rank r takes micro-batches r, r + world, ... and accumulates their gradients, so the global
batch of a step and its loss are the same on any number of ranks. With the FoT objective the rows of a micro-batch see
one another in the memory layers, as the CrossBatch plan says (paper, section 3.2). Checkpoints hold model, optimizer
and step; batches and learning rates are functions of the step, so a resumed run continues bit for bit.
"""

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import torch
from torch import Tensor
from torch.nn import functional

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan, default_mem_layers
from jobs.data.batches import make_sampler
from jobs.recipe import FotObjective, ModelShape, Objective, Schedule, Training
from jobs.train.spec import METRICS, MODEL, TrainSpec
from pipelines.dataset import TokenDataset
from pipelines.files import write_atomically
from pipelines.loader import TensorBatch, rank_batches
from pipelines.sampler import IGNORE, CrossBatchSampler
from pipelines.store import RECORD
from pipelines.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train_loop(spec: TrainSpec) -> None:
    """Train from the latest checkpoint, or the base, to the last step, then export the model."""
    training, objective = spec.training, spec.training.objective
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    _log_to_file(spec.logs / f"rank{rank}.log")
    device = ray.train.torch.get_device()
    torch.manual_seed(spec.seed)

    engine = _engine(build_model(spec), training, world)
    dataset = TokenDataset(spec.shards, spec.documents)
    sampler = make_sampler(dataset, spec.groups, training, spec.data, spec.seed)
    step = _restore(engine)
    batches = rank_batches(sampler, range(step, training.steps), rank, world, workers=int(device.type == "cuda"))
    metrics = Metrics(spec.output / METRICS, step) if rank == 0 else None

    while step < training.steps:
        began = time.monotonic()
        for group in engine.optimizer.param_groups:
            group["lr"] = training.optimizer.learning_rate * schedule_factor(training.schedule, step, training.steps)
        total = torch.zeros((), device=device)
        for _ in range(rank, training.batch.micro_batches, world):
            loss = batch_loss(engine, next(batches), objective, device)
            engine.backward(loss)
            engine.step()  # applies the gradients at the last micro-batch of the step
            total += loss.detach() / training.batch.micro_batches
        torch.distributed.all_reduce(total)
        step += 1
        _check_finite(total.item(), step)
        if metrics is not None:
            metrics.write(step, total.item(), engine.optimizer.param_groups[0]["lr"], sampler, began)
        if step % training.checkpoint_every == 0 or step == training.steps:
            _save(engine, step, spec.output)

    if rank == 0:
        _export(engine, spec)
    torch.distributed.barrier()


def build_model(spec: TrainSpec) -> FotLlamaForCausalLM:
    """The base with the objective's memory layers, or a new LLaMA of the given shape."""
    objective, dtype = spec.training.objective, DTYPES[spec.training.deepspeed.dtype]
    if isinstance(spec.base, ModelShape):
        tokenizer = load_tokenizer(spec.tokenizer)
        config = FotLlamaConfig(
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            max_position_embeddings=objective.context,
            hidden_size=spec.base.hidden_size,
            intermediate_size=spec.base.intermediate_size,
            num_hidden_layers=spec.base.num_hidden_layers,
            num_attention_heads=spec.base.num_attention_heads,
            num_key_value_heads=spec.base.num_key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": spec.base.rope_theta},
            tie_word_embeddings=spec.base.tie_word_embeddings,
        )
        return FotLlamaForCausalLM(config).to(dtype)
    config = FotLlamaConfig.from_pretrained(spec.base)
    if isinstance(objective, FotObjective):
        config.mem_layers = list(objective.mem_layers or default_mem_layers(config.num_hidden_layers))
        config.mem_positionals = objective.mem_positionals
        config.local_context = objective.context
        config.last_context_length = None  # windows that do not depend on how an input is split
    return FotLlamaForCausalLM.from_pretrained(spec.base, config=config, dtype=dtype)


def batch_loss(model: torch.nn.Module, batch: TensorBatch, objective: Objective, device: torch.device) -> Tensor:
    """Mean next-token loss (nats per token) of a micro-batch."""
    plan = None
    if isinstance(objective, FotObjective):
        plan = cross_batch_plan(batch.group, batch.segment, batch.related, objective.segments)
    logits = model(batch.input_ids.to(device, non_blocking=True), plan=plan, use_cache=False).logits
    labels = batch.labels.to(device, non_blocking=True)
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def schedule_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied with at a step (0 to steps - 1)."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


class Metrics:
    """The log of a training, a JSON line a step. Steps after `start` are of a run that died: they are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        write_atomically(path, "".join(kept).encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the worker's life, a line at a time

    def write(self, step: int, loss: float, learning_rate: float, sampler: CrossBatchSampler, began: float) -> None:
        entry = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "tokens": step * sampler.shape.tokens_per_step,
            "tokens_per_second": sampler.shape.tokens_per_step / (time.monotonic() - began),
            "time": time.time(),
        }
        self._file.write(json.dumps(entry) + "\n")


def _engine(model: torch.nn.Module, training: Training, world: int) -> Any:
    # On CPU DeepSpeed would compile its shared-memory op for over a minute; gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.optimizer.learning_rate,
        betas=training.optimizer.betas,
        weight_decay=training.optimizer.weight_decay,
    )
    rows = training.batch.groups * len(training.objective.segments)
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": training.batch.micro_batches // world,
        "gradient_clipping": training.optimizer.clip,
        "zero_optimization": {"stage": training.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": training.deepspeed.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _restore(engine: Any) -> int:
    """Load the latest checkpoint, if there is one. Returns the steps done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        _, state = engine.load_checkpoint(directory)
    return int(state["step"])


def _save(engine: Any, step: int, output: Path) -> None:
    """A checkpoint of all ranks: every rank hands its files to Ray Train, which completes it or leaves it invisible."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".checkpoint.", suffix=".tmp") as directory:
        engine.save_checkpoint(directory, tag="state", client_state={"step": step})
        torch.distributed.barrier()
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _export(engine: Any, spec: TrainSpec) -> None:
    """The trained model as a Hugging Face directory with its tokenizer."""
    target = spec.output / MODEL
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=spec.output, prefix=f".{MODEL}.", suffix=".tmp") as temporary:
        unfinished = Path(temporary) / MODEL
        engine.module.save_pretrained(unfinished)
        for file in spec.tokenizer.iterdir():
            if file.suffix == ".json" and file.name != RECORD:
                (unfinished / file.name).write_bytes(file.read_bytes())
        os.rename(unfinished, target)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of step {step} is {loss}")


def _log_to_file(path: Path) -> None:
    """Send what this worker and its libraries print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
