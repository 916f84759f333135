"""A checkpoint as a Hugging Face directory: safetensors, configuration and tokenizer.

The weights are put together from what the ranks wrote: under ZeRO from their parts of the float32 weights that the
optimizer holds, mapped from the files. In memory there are, at the most, these weights once and once more as exported.
"""

import io
import os
import stat
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from jobs.train.checkpoint_store import MODEL_FILES, Checkpoint, CheckpointStore, split_step, step_name
from pipelines.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = "mp_rank_00_model_states.pt"  # DeepSpeed's file with all weights, where ZeRO does not divide them
CONFIGURATIONS = ("config.json", "generation_config.json")  # what transformers writes itself


def export_checkpoint(checkpoint: str, target: Path, dtype: str | None = None) -> None:
    """Write the weights of a checkpoint as a Hugging Face directory, complete or not at all.

    `checkpoint`: path or URI of a `step-` directory, or of the directory above, whose newest complete one is taken.
    `dtype`: of the weights, by default that of the training. Raises UserError where the checkpoint is missing,
    incomplete or damaged, and where `target` exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{dtype!r} is no dtype to export: choose one of {', '.join(DTYPES)}")
    if target.exists():
        raise UserError(f"{target} exists: remove it, or export to another directory")
    where, step = split_step(checkpoint)
    store = CheckpointStore(where)
    found = _choose(store, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as temporary:
        copies = None if store.local is not None else Path(temporary) / step_name(found.step)
        damaged = store.damaged(found.step, found.files, copies)
        if damaged is not None:
            raise UserError(
                f"{store.name}: {step_name(found.step)}/{damaged} is damaged or missing: export another checkpoint"
            )
        directory = (store.local or Path(temporary)) / step_name(found.step)
        _write_model(directory, Path(temporary) / "model", dtype or found.records[0].dtype)
        os.rename(Path(temporary) / "model", target)


def _choose(store: CheckpointStore, step: int | None) -> Checkpoint:
    """The complete checkpoint of a step, or the newest one."""
    there = [found for found in store.all() if step in (None, found.step)]
    complete = [found for found in there if found.complete]
    if complete:
        return complete[-1]
    if not there:
        name = "" if step is None else f" {step_name(step)}"
        raise UserError(f"{store.name} holds no checkpoint{name}: give a step-… directory, or the one above")
    raise UserError(
        f"{store.name}: {step_name(there[-1].step)} is incomplete (nothing of rank {there[-1].missing[0]}): its "
        f"training was stopped while writing it, choose one before or go on with the training"
    )


def _write_model(checkpoint: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import GenerationConfig

    from fot_model import FotLlamaConfig, FotLlamaForCausalLM

    files = checkpoint / MODEL_FILES
    state = _weights(checkpoint)
    for name in state:  # a tensor at a time
        state[name] = state[name].contiguous().to(getattr(torch, dtype))
    with torch.device("meta"):
        model = FotLlamaForCausalLM(FotLlamaConfig.from_pretrained(files))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(files)
    model.save_pretrained(target)
    for file in files.iterdir():
        if file.name not in CONFIGURATIONS:
            (target / file.name).write_bytes(file.read_bytes())
    mode = stat.S_IMODE((target / CONFIGURATIONS[0]).stat().st_mode)
    for file in target.glob("*.safetensors"):
        file.chmod(mode)  # safetensors lets no one else read it


def _weights(checkpoint: Path) -> dict[str, Any]:
    """The model's tensors, or under ZeRO 3 what `contiguous()` makes them."""
    import torch

    if not any(checkpoint.glob("*_optim_states.pt")):
        return dict(torch.load(checkpoint / WEIGHTS, map_location="cpu", mmap=True, weights_only=False)["module"])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the import has something to say, too
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(
            get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
        )
