"""AdamW with parameter groups, and how learning rates go over the steps: for trainings with DeepSpeed and without."""

import math
import re
from typing import Any

import torch

from jobs.config.training import Optimizer, RateSchedule
from pipelines.workflow.errors import UserError


def make_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW with the groups of `parameter_groups`, each at its peak learning rate."""
    return torch.optim.AdamW(parameter_groups(model, settings), lr=settings.learning_rate, betas=settings.betas)


def parameter_groups(model: torch.nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups of what is trained: those of the recipe, each parameter in the first that its name
    matches, then the rest.

    Raises UserError for a pattern that the name of no trained parameter matches.
    """
    taken: set[str] = set()
    groups = []
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for number, group in enumerate(settings.groups):
        names = [name for name in parameters if re.search(group.pattern, name)]
        if not names:
            raise UserError(
                f"optimizer.groups.{number}.pattern {group.pattern!r} matches no parameter of the model that is trained"
            )
        groups.append((group.learning_rate, group.weight_decay, [name for name in names if name not in taken]))
        taken.update(names)
    groups.append((None, None, [name for name in parameters if name not in taken]))
    return [
        {
            "params": [parameters[name] for name in names],
            "lr": settings.learning_rate if rate is None else rate,
            "weight_decay": settings.weight_decay if decay is None else decay,
        }
        for rate, decay, names in groups
        if names
    ]


def schedule_factor(schedule: RateSchedule, step: int, steps: int) -> float:
    """What peak learning rates are multiplied with at a step, of `steps`; a cosine stays at its floor after them."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * progress)) / 2
