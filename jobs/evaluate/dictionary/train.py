"""One seed's training of the dictionary task: a plain loop in one process, on CPU or GPU.

A step is a function of (recipe, seed, step), and a checkpoint holds model, optimizer and step: a training that was
killed goes on from the last one, and on CPU ends with the same bits.

Shapes: R rows, L tokens, d additional contexts, V vocabulary, G documents, A askers.
"""

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, c_prev_plan
from jobs.config.dictionary import WINDOW, DictionaryOptimizer, DictionaryRecipe, DictionaryShape, Phase
from jobs.config.training import Optimizer, ParameterGroup, RateSchedule
from jobs.evaluate.dictionary.task import IGNORE, PAD, VOCABULARY, training_batch
from jobs.train.metrics import MetricsFile
from jobs.train.optimizer import make_optimizer, schedule_factor
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import complete_or_invisible
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.progress import Progress


def train_seed(recipe: DictionaryRecipe, seed: int, output: Path) -> None:
    """Train a model from nothing: output/model (a Hugging Face directory), output/metrics.jsonl (a line a step).

    Goes on from output/checkpoint.pt where there is one; does nothing where the model is there. Raises UserError for
    a checkpoint of another training.
    """
    settings = recipe.training
    if (output / "model").exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = hash_json(
        [recipe.model.model_dump(mode="json"), settings.model_dump(mode="json", exclude={"checkpoint_every"}), seed]
    )
    model = build_model(recipe.model, seed).to(device).train()
    optimizer = make_optimizer(model, like_training(settings.optimizer))
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup = RateSchedule(warmup_steps=settings.optimizer.warmup_steps)
    done, cpu_seconds = load_checkpoint(output / "checkpoint.pt", training, model, optimizer)
    begin = time.process_time() - cpu_seconds
    metrics = MetricsFile(output / "metrics.jsonl", done)
    with Progress(f"train seed {seed}", settings.steps, "steps") as progress:
        progress.resume_at(done)
        for step, phase, rate in itertools.islice(schedule(settings.phases), done, None):
            rate *= schedule_factor(warmup, step, settings.steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate * peak
            hold_temperature(model, phase.temperature)
            loss, accuracy = batch_loss(model, phase, seed, step)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip)
            optimizer.step()
            hold_temperature(model, phase.temperature)
            values = {
                "loss": loss.item(),
                "accuracy": accuracy.item(),
                "gradient_norm": norm.item(),
                "temperature": mean_temperature(model),
                "learning_rate": rate * settings.optimizer.learning_rate,
                "cpu_seconds": time.process_time() - begin,
            }
            metrics.write(step + 1, values)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                state = {"training": training, "done": step + 1, "cpu_seconds": values["cpu_seconds"]}
                save_checkpoint(output / "checkpoint.pt", state, model, optimizer)
            progress.set(step + 1, f"loss {values['loss']:.3f} accuracy {values['accuracy']:.3f}")
    save_model(model, output / "model")
    (output / "checkpoint.pt").unlink()


def model_config(shape: DictionaryShape) -> FotLlamaConfig:
    """The configuration of a model of this shape."""
    return FotLlamaConfig(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=WINDOW,
        mem_positionals=False,
        mem_qk_norm=True,
        **{**shape.model_dump(), "mem_layers": list(shape.mem_layers)},
    )


def build_model(shape: DictionaryShape, seed: int) -> FotLlamaForCausalLM:
    """A new model, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FotLlamaForCausalLM(model_config(shape))


def like_training(settings: DictionaryOptimizer) -> Optimizer:
    """The same as of any training, whose groups are: all but the temperatures, then these, by the optimizer's own."""
    rest = ParameterGroup(
        pattern="(?<!mem_temperature)$",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    return Optimizer(
        learning_rate=settings.temperature_learning_rate, weight_decay=0.0, betas=settings.betas, groups=(rest,)
    )


def schedule(phases: tuple[Phase, ...]) -> Iterator[tuple[int, Phase, float]]:
    """(step from 0, phase, what learning rates are multiplied with), for all steps."""
    first = 0
    for phase in phases:
        start, end = phase.rate
        for place in range(phase.steps):
            yield first + place, phase, start + (end - start) * place / phase.steps
        first += phase.steps


def batch_loss(model: FotLlamaForCausalLM, phase: Phase, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Loss (nats) and accuracy on the value tokens of a step's questions."""
    symbols = phase.symbols[step % len(phase.symbols)]
    tokens, labels = training_batch(seed, step, phase.documents, phase.askers, phase.records, symbols)
    tokens_RL, labels_RL = (torch.from_numpy(x).to(model.device) for x in (tokens, labels))
    logits_RLV = model(tokens_RL, plan=plan_of(phase.documents, phase.askers, phase.d)).logits
    logits_ALV, wanted_AL = logits_RLV[phase.documents :, :-1], labels_RL[phase.documents :, 1:]
    loss = functional.cross_entropy(logits_ALV.flatten(0, 1), wanted_AL.flatten(), ignore_index=IGNORE)
    asked_AL = wanted_AL != IGNORE
    return loss, (logits_ALV.argmax(-1)[asked_AL] == wanted_AL[asked_AL]).float().mean()


@cache
def plan_of(documents: int, askers: int, d: int) -> Tensor:
    """Plan [documents + askers, d]: questions see the records of their own document and of the d - 1 next."""
    unrelated_GG = [[one == other for other in range(documents)] for one in range(documents)]
    group_R = [*range(documents), *range(askers)]
    return c_prev_plan(group_R, [0] * documents + [1] * askers, unrelated_GG, d)


def hold_temperature(model: torch.nn.Module, temperature: float | None) -> None:
    """Set all temperatures, if to anything."""
    if temperature is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mem_temperature"):
                    parameter.fill_(temperature)


def mean_temperature(model: torch.nn.Module) -> float:
    """Over all heads of all memory layers."""
    named = model.named_parameters()
    return (
        torch.cat([parameter.detach() for name, parameter in named if name.endswith("mem_temperature")]).mean().item()
    )


def load_checkpoint(
    path: Path, training: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put a checkpoint's state into model and optimizer. Returns the steps done and their CPU seconds; 0 without one.
    Raises UserError where it is of another training."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["training"] != training:
        raise UserError(
            f"{path} is of another training (other settings or seed): remove it, or choose another work_dir"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"], state["cpu_seconds"]


def save_checkpoint(
    path: Path, state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint, complete or not at all."""
    with complete_or_invisible(path) as temporary:
        torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)


def save_model(model: FotLlamaForCausalLM, directory: Path) -> None:
    """Write a Hugging Face directory, complete or not at all."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    os.replace(temporary, directory)
