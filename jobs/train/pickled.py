"""Checkpoints are pickles, and to load a pickle is to run what it names: they are looked through before that."""

import pickle
from collections.abc import Iterable
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

OF_DEEPSPEED = frozenset(  # what its states hold beside tensors: numbers, no code
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def foreign_code(files: Iterable[Path]) -> str | None:
    """What is in one of the files that a training does not write there, in words; None if nothing is. Runs nothing."""
    for file in files:
        try:
            names = get_unsafe_globals_in_checkpoint(str(file))
        except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            return f"{file} is none of torch's checkpoints ({str(error).splitlines()[0]})"
        if foreign := sorted(set(names) - OF_DEEPSPEED):
            return f"{file} holds {foreign[0]}, which to load would be to run"
    return None
