"""The training loop, as every Ray Train worker (a rank) runs it.

A step is M micro-batches. A team of ranks (one rank, unless micro-batches are spread over several) takes micro-batches
t, t + teams, ... and accumulates their gradients. The loss of a step is the mean over all its labelled tokens, wherever
they lie, so it is the same on any number of ranks, as is the global batch. With the FoT objective the rows of a
micro-batch see one another in the memory layers, as the CrossBatch plan says (paper, section 3.2). Checkpoints hold
model, optimizer and step; batches, learning rates and d are functions of the step, so a resumed training continues bit
for bit.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch.distributed import ProcessGroup

from jobs.common.stop import StoppedError
from jobs.config.train_spec import ADAPTER, METRICS, MODEL, Start, TrainSpec
from jobs.config.training import FotObjective, Resources
from jobs.measures.windows import choose_windows
from jobs.models.shape import Shape
from jobs.train.bad_loss import BadLossError, LossWatch, SkippedSteps
from jobs.train.batches import make_sampler
from jobs.train.checkpoints import Checkpoints, Frozen
from jobs.train.engine import make_engine, take_step
from jobs.train.estimate import peak_flops, step_flops, tokens_per_step
from jobs.train.export import export_adapter, export_checkpoint
from jobs.train.machine import MachineWatch, memory_gigabytes
from jobs.train.measure import evaluating, held_out_perplexity, mass_on_positives
from jobs.train.metrics import MetricsFile
from jobs.train.model import build_model
from jobs.train.objective import batch_loss, d_at
from jobs.train.optimizer import schedule_factor
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.loader import rank_batches
from pipelines.batches.sampler import CrossBatchSampler
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say


def train_loop(spec: TrainSpec) -> None:
    """Train from the newest checkpoint, or where it starts, to the last step, then export the model.

    Raises BadLossError, DamagedShardError, UserError for what does not go together, and StoppedError where it was asked
    to stop.
    """
    training, objective, seed = spec.training, spec.training.objective, spec.seed
    ranks = Ranks.of(spec.resources)
    log_to_file(spec.logs / f"rank{ranks.rank}.log")
    torch.set_num_threads(spec.resources.cpus_per_worker)  # offloaded optimizers step on them, too
    torch.manual_seed(seed)

    model, adapter = build_model(spec)
    frozen = Frozen(spec.base, adapter) if adapter is not None and isinstance(spec.base, Path) else None
    checkpoints = Checkpoints(spec.checkpoints, spec.identity, training.checkpoints, spec.tokenizer, frozen)
    shape = Shape.of(model.config.to_dict())
    accumulation = training.batch.micro_batches // ranks.teams
    engine = make_engine(model, training, accumulation)
    peaks = [group["lr"] for group in engine.optimizer.param_groups]
    dataset = TokenDataset(spec.shards, spec.documents)
    sampler = make_sampler(dataset, spec.groups, training, spec.data, seed, spec.start)
    skipped = SkippedSteps(spec.output, training.bad_loss)
    machine = MachineWatch(ranks.device)

    while True:
        restored = checkpoints.restore(engine)
        done, state = restored or begin(engine, checkpoints, spec.start)
        check_done(done, spec.last, spec.checkpoints)
        skipped.remember(state.get("skipped", {}), write=ranks.rank == 0)
        watch = LossWatch(training.bad_loss, state.get("losses", []))
        metrics = MetricsFile(spec.output / METRICS, done)
        steps = [step for step in range(done, spec.last) if step not in skipped]
        batches = rank_batches(sampler, steps, ranks.rank, ranks.world, ranks.readers, ranks.team_size)
        if restored is None and training.bad_loss.action == "skip":
            checkpoints.save(engine, done, state)  # what there is to go back to
        try:
            for step in steps:
                began = time.monotonic()
                factor = schedule_factor(training.schedule, step, training.steps)
                for group, peak in zip(engine.optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                labels = sampler.labels(step)
                total, norm = torch.zeros((), device=ranks.device), None
                for _ in range(accumulation):
                    batch = next(batches).to(ranks.device)
                    loss = batch_loss(engine, batch, objective, step, seed, labels, ranks.team)
                    engine.backward(loss * ranks.world * accumulation)  # it takes means over both, of shares of a sum
                    norm = take_step(engine)  # applies the gradients at the last micro-batch of the step
                    total += loss.detach()
                asked = torch.tensor(float(spec.stop is not None and spec.stop.exists()), device=ranks.device)
                torch.distributed.all_reduce(sums := torch.stack([total, asked]))
                loss_of_step, stops = sums[0].item(), sums[1].item() > 0
                watch.check(step, loss_of_step, norm)
                seconds = time.monotonic() - began

                measured = {}
                if training.measure is not None and (step + 1) % training.measure.every == 0:
                    measured = measure(engine.module, spec, dataset, sampler, ranks)
                if ranks.rank == 0:
                    values = {"loss": loss_of_step, "learning_rate": training.optimizer.learning_rate * factor}
                    values |= progress_of(spec, shape, step, seconds, skipped.before(step), ranks)
                    values |= {} if norm is None else {"gradient_norm": norm}
                    values |= measured | checkpoints.timings() | machine.look()
                    metrics.write(step + 1, values)
                if (stops or (step + 1) % training.checkpoints.every == 0) and step + 1 < spec.last:
                    checkpoints.save(engine, step + 1, {"losses": watch.recent, "skipped": dict(skipped.reasons)})
                if stops and step + 1 < spec.last:
                    checkpoints.wait()
                    raise StoppedError(f"stopped at step {step + 1} of {spec.last}, with a checkpoint")
            break
        except BadLossError as bad:
            skipped.add(bad, write=ranks.rank == 0)
            say(f"step {bad.step + 1}: {bad.what}: back to the last checkpoint, and on without it")

    if done < spec.last:
        checkpoints.save(engine, spec.last, {"losses": watch.recent, "skipped": dict(skipped.reasons)})
    checkpoints.wait()
    if ranks.rank == 0 and frozen is not None and not (spec.output / ADAPTER).exists():
        export_adapter(spec.checkpoints, spec.output / ADAPTER, training.deepspeed.dtype)
    if ranks.rank == 0 and not (spec.output / MODEL).exists():
        export_checkpoint(spec.checkpoints, spec.output / MODEL, training.deepspeed.dtype)


@dataclass(frozen=True)
class Ranks:
    """This rank among all, and its team: the ranks that a micro-batch is spread over, None where it is this one."""

    rank: int
    world: int
    team_size: int
    team: ProcessGroup | None
    device: torch.device

    @classmethod
    def of(cls, resources: Resources) -> "Ranks":
        context, size = ray.train.get_context(), resources.ranks_per_micro_batch
        rank, world = context.get_world_rank(), context.get_world_size()
        team = None
        if size > 1:
            teams = [list(range(first, first + size)) for first in range(0, world, size)]
            team, _ = torch.distributed.new_subgroups_by_enumeration(teams)
        return cls(rank, world, size, team, ray.train.torch.get_device())

    @property
    def teams(self) -> int:
        return self.world // self.team_size

    @property
    def readers(self) -> int:
        """Processes that read batches ahead: a GPU should not wait for them."""
        return int(self.device.type == "cuda")


def begin(engine: Any, checkpoints: Checkpoints, start: Start | None) -> tuple[int, dict[str, Any]]:
    """Where there is no checkpoint yet: the base at step 0, or the end of the training that is gone on with."""
    return (0, {}) if start is None else checkpoints.take_over(engine, start.checkpoints, start.step)


def check_done(done: int, last: int, where: str) -> None:
    """Raises UserError where the checkpoints are further than the training is to go."""
    if done > last:
        raise UserError(
            f"the checkpoints in {where} are at step {done}, the training is to end at {last}: raise its "
            f"steps to {done} or more, export an earlier checkpoint with `fot export`, or set another checkpoints.path"
        )


def measure(
    model: Any, spec: TrainSpec, dataset: TokenDataset, sampler: CrossBatchSampler, ranks: Ranks
) -> dict[str, float]:
    """Perplexity on held-out windows, and the attention mass on positives in the first micro-batches after the
    training's end: the same every time, so that values compare."""
    settings, objective = spec.training.measure, spec.training.objective
    assert settings is not None
    windows = choose_windows(dataset, objective.context, max(settings.contexts), settings.windows, "measure.contexts")
    beyond = spec.last
    batch = next(rank_batches(sampler, [beyond], ranks.rank, ranks.world, spread=ranks.team_size)).to(ranks.device)
    with evaluating(model):
        found = held_out_perplexity(
            model, dataset, windows, settings.contexts, objective.context, ranks.rank, ranks.world, ranks.device
        )
        return found | mass_on_positives(model, batch, objective, beyond, spec.seed, ranks.team)


def progress_of(
    spec: TrainSpec, shape: Shape, step: int, seconds: float, skipped: int, ranks: Ranks
) -> dict[str, float]:
    """Tokens so far and a second (of all ranks), d, memory of rank 0; MFU where the device's peak is known."""
    training, objective = spec.training, spec.training.objective
    tokens = tokens_per_step(training)
    values = {"tokens": (step + 1 - skipped) * tokens, "tokens_per_second": tokens / seconds, "skipped_steps": skipped}
    values["memory_gb"] = memory_gigabytes(ranks.device)
    if isinstance(objective, FotObjective) and objective.d is not None:
        values["d"] = d = d_at(objective, step, spec.seed)
        training = training.model_copy(update={"objective": objective.model_copy(update={"d": d})})
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    if (peak := peak_flops(name, training.deepspeed.dtype)) is not None:
        values["mfu"] = step_flops(shape, training) / seconds / (peak * ranks.world)
    return values


def log_to_file(path: Path) -> None:
    """Send what this worker and its libraries print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
