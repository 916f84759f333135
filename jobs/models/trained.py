"""Which of a model's parameters a training trains, by their names: no torch, so that `fot plan` asks the same."""

import re
from collections.abc import Collection, Sequence

from jobs.config.training import Patterns, Training
from pipelines.workflow.errors import UserError

LAYER = r"model\.layers\.(\d+)\."


def trained_names(training: Training, names: Sequence[str], mem_layers: Collection[int]) -> list[str]:
    """Those of `names` (a model's parameters, tied ones once) that are trained, in order; LoRA is left out of account.

    Raises UserError for a pattern that matches none.
    """
    train = training.train
    if isinstance(train, Patterns):
        for number, pattern in enumerate(train.patterns):
            if not any(re.search(pattern, name) for name in names):
                raise UserError(
                    f"finetune.train.patterns.{number} {pattern!r} matches no parameter of the model: names are like "
                    f"{next((name for name in names if 'q_proj' in name), names[0])}"
                )
        return [name for name in names if any(re.search(pattern, name) for pattern in train.patterns)]
    if train == "all":
        return list(names)
    assert mem_layers, "the recipe is checked"
    if train == "memory_attention":
        return [name for name in names if layer_of(name) in mem_layers and ".self_attn." in name]
    above = {"model.norm.weight", "lm_head.weight"}
    lowest = min(mem_layers)
    return [name for name in names if name in above or ((layer := layer_of(name)) is not None and layer >= lowest)]


def lora_modules(training: Training, scope: Sequence[str]) -> list[str]:
    """The modules that get LoRA's pairs, of `scope`: what `trained_names` chose. Raises UserError where there are
    none."""
    assert training.lora is not None, "no LoRA is asked for"
    modules = [name.removesuffix(".weight") for name in scope if name.endswith("_proj.weight")]
    found = [module for module in modules if module.rpartition(".")[2] in training.lora.targets]
    if not found:
        raise UserError(
            f"finetune.lora.targets {list(training.lora.targets)}: none of them is among what finetune.train chooses"
        )
    return found


def whole_beside_lora(name: str) -> bool:
    """Whether a parameter that `trained_names` chose is trained itself beside LoRA: a number a head, and new."""
    return name.endswith((".mem_gate", ".mem_temperature"))


def layer_of(name: str) -> int | None:
    """The layer that a parameter lies in, None for embeddings, the last norm and the output layer."""
    found = re.match(LAYER, name)
    return int(found[1]) if found else None
