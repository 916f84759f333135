"""A checkpoint as a Hugging Face directory: safetensors, configuration and tokenizer.

The weights are put together from what the ranks wrote: under ZeRO from their parts of the float32 weights that the
optimizer holds, mapped from the files. In memory there are, at the most, these weights once and once more as exported.
What was written is loaded again, and must hold what was trained and give its logits, to the bit, before it is visible.

Shapes: L tokens, V vocabulary.
"""

import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config.training import MemoryRows, Objective
from jobs.models.layers import memory_layer_numbers
from jobs.train.checkpoint_store import MODEL_FILES, Checkpoint, CheckpointStore, Record, split_step, step_name
from pipelines.workflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fot_model import Adapter, FotLlamaForCausalLM

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = "mp_rank_00_model_states.pt"  # DeepSpeed's file with all weights, where ZeRO does not divide them
PEFT = ".default"  # what peft calls the only LoRA of a module
TOKENIZER = r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*"
READ_BACK = 32  # tokens that what was exported is compared on
ADAPTER_FILES = ("adapter.json", "adapter.safetensors")
CONFIGURATIONS = ("config.json", "generation_config.json")  # what transformers writes itself


def export(checkpoint: str, target: Path, dtype: str | None, as_adapter: bool, base: Path | None) -> None:
    """What `fot export` does: `checkpoint` is a training's, or an adapter's directory, which is put on its base."""
    if is_adapter(Path(checkpoint).expanduser()):
        if base is None or as_adapter:
            raise UserError(f"{checkpoint} is an adapter already: with --base CHECKPOINT it becomes a whole model")
        merge_adapter(Path(checkpoint).expanduser(), base, target, dtype)
    elif as_adapter:
        export_adapter(checkpoint, target, dtype)
    else:
        export_checkpoint(checkpoint, target, dtype, base)


def export_checkpoint(checkpoint: str, target: Path, dtype: str | None = None, base: Path | None = None) -> None:
    """Write the weights of a checkpoint as a Hugging Face directory, complete or not at all.

    `checkpoint`: path or URI of a `step-` directory, or of the directory above, whose newest complete one is taken.
    `dtype`: of the weights, by default that of the training. `base`: where the base of a training in part lies now, if
    it was moved. Raises UserError where the checkpoint is missing, incomplete or damaged, where its base is not what it
    was, and where `target` exists.
    """
    _export(checkpoint, target, dtype, partial(_write_model, base=base))


def export_adapter(checkpoint: str, target: Path, dtype: str | None = None) -> None:
    """Write what a training in part trained as an adapter of its base, complete or not at all. Arguments and errors as
    of `export_checkpoint`; UserError, too, where everything was trained."""
    _export(checkpoint, target, dtype, _write_adapter)


def merge_adapter(adapter: Path, base: Path, target: Path, dtype: str | None = None) -> None:
    """Write a base with an adapter of it as one Hugging Face directory, with the base's tokenizer, complete or not at
    all. `dtype`: by default the base's. Raises UserError where one of the two is damaged or not the other's, and where
    `target` exists."""
    _check_target(target, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as temporary:
        made = Path(temporary) / "made"
        model = _on_its_base(load_adapter(adapter), base, dtype or "auto")
        _save(model, [file for file in base.iterdir() if re.fullmatch(TOKENIZER, file.name)], made)
        os.rename(made, target)


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_FILES[0]).exists()


def load_adapter(directory: Path) -> "Adapter":
    """Raises UserError for a directory that holds no whole adapter."""
    from fot_model import Adapter

    try:
        return Adapter.load(directory)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_adapter(adapter: Path, base: Path, objective: Objective) -> None:
    """Raises UserError for an adapter that is damaged, not of this base, or trained with other memory layers than the
    objective's."""
    from fot_model import FotLlamaConfig

    loaded = load_adapter(adapter)
    if isinstance(objective, MemoryRows):
        layers = FotLlamaConfig.from_pretrained(base).num_hidden_layers
        ours = {
            "mem_layers": memory_layer_numbers(objective, layers),
            "mem_positionals": objective.mem_positionals,
        }
        for name, value in ours.items():
            if (theirs := loaded.settings.get(name)) != value:
                raise UserError(
                    f"base.adapter {adapter} was trained with {name} {theirs}, the recipe has {value}: set "
                    f"finetune.objective.{name}"
                )
    _on_its_base(loaded, base, "auto")


def _check_target(target: Path, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{dtype!r} is no dtype to export: choose one of {', '.join(DTYPES)}")
    if target.exists():
        raise UserError(f"{target} exists: remove it, or export to another directory")


def _export(checkpoint: str, target: Path, dtype: str | None, write: Callable[[Path, Record, Path, str], None]) -> None:
    """`write` is given the checkpoint's directory and a record of it, the directory to make, and the type."""
    _check_target(target, dtype)
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
        record = found.records[0]
        write(directory, record, Path(temporary) / "made", dtype or record.dtype)
        os.rename(Path(temporary) / "made", target)


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


def _write_model(checkpoint: Path, record: Record, target: Path, dtype: str, base: Path | None) -> None:
    import torch
    from transformers import GenerationConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from fot_model import FotLlamaConfig, FotLlamaForCausalLM
    from fot_model.checkpoint import own_output_layer

    files = checkpoint / MODEL_FILES
    if record.base is not None:
        model = _on_its_base(_adapter(checkpoint, record), base or Path(record.base["path"]), dtype)
    else:
        state = _weights(checkpoint)
        for name in state:  # a tensor at a time
            state[name] = state[name].contiguous().to(getattr(torch, dtype))
        config = FotLlamaConfig.from_pretrained(files)
        config.tie_word_embeddings &= not own_output_layer(state)
        with torch.device("meta"):
            model = FotLlamaForCausalLM(config)
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # which holds nothing that is loaded
        model.load_state_dict(state, assign=True)
        model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(files)
    _save(model, [file for file in files.iterdir() if file.name not in (*CONFIGURATIONS, *ADAPTER_FILES)], target)


def _save(model: "FotLlamaForCausalLM", files: Iterable[Path], target: Path) -> None:
    """The model, and files beside it. Raises AssertionError where what was written is not the model."""
    expected = _logits(model)
    model.save_pretrained(target)
    _check_written(target, model, expected)
    for file in files:
        (target / file.name).write_bytes(file.read_bytes())
    mode = stat.S_IMODE((target / CONFIGURATIONS[0]).stat().st_mode)
    for file in target.glob("*.safetensors"):
        file.chmod(mode)  # safetensors lets no one else read it


def _logits(model: "FotLlamaForCausalLM") -> "Tensor":
    """[1, L, V] of tokens from everywhere in the vocabulary."""
    import torch

    V, L = model.config.vocab_size, min(READ_BACK, model.config.window)
    ids_1L = torch.arange(L)[None] * (V // L + 1) % V
    with torch.inference_mode():
        return model.eval()(ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False).logits


def _check_written(target: Path, model: "FotLlamaForCausalLM", expected_1LV: "Tensor") -> None:
    import torch

    from fot_model import FotLlamaForCausalLM

    def bits(tensor: "Tensor") -> "Tensor":  # no number equals itself that is none
        return tensor.contiguous().view(torch.uint8)

    written = FotLlamaForCausalLM.from_pretrained(target, dtype="auto")
    there = written.state_dict()
    other = [name for name, tensor in model.state_dict().items() if not torch.equal(bits(there[name]), bits(tensor))]
    if other or not torch.equal(bits(_logits(written)), bits(expected_1LV)):
        raise AssertionError(f"what was written is not what was trained ({other or 'logits'}): nothing is exported")


def _write_adapter(checkpoint: Path, record: Record, target: Path, dtype: str) -> None:
    import torch

    if record.base is None:
        raise UserError(f"{checkpoint}: all parameters were trained, which is no adapter: export it without --adapter")
    _adapter(checkpoint, record).to(getattr(torch, dtype)).save(target)


def _adapter(checkpoint: Path, record: Record) -> "Adapter":
    """What the checkpoint holds, with what its training took over from an earlier adapter."""
    from fot_model import Adapter, FotLlamaConfig
    from fot_model.checkpoint import EMBEDDINGS, OUTPUT_LAYER, own_output_layer

    kept, weights = Adapter.load(checkpoint / MODEL_FILES), _weights(checkpoint)
    ends = {name: weights[name].contiguous() for name in (OUTPUT_LAYER, EMBEDDINGS) if name in weights}
    if FotLlamaConfig.from_pretrained(checkpoint / MODEL_FILES).tie_word_embeddings and not own_output_layer(ends):
        weights.pop(OUTPUT_LAYER, None)  # it is the embeddings
    trained = {name.replace(PEFT, ""): tensor.contiguous() for name, tensor in weights.items()}
    return replace(kept, tensors={**kept.tensors, **trained}, training={**kept.training, "step": record.step})


def _on_its_base(adapter: "Adapter", base: Path, dtype: str) -> "FotLlamaForCausalLM":
    from fot_model import FotLlamaForCausalLM

    if not base.is_dir():
        raise UserError(f"the base of the adapter is not in {base}: say where it is (--base DIR)")
    try:
        return FotLlamaForCausalLM.from_pretrained(base, adapter=adapter, dtype=dtype)
    except ValueError as error:
        raise UserError(f"{error}: give the one that it was trained from") from None


def _weights(checkpoint: Path) -> dict[str, Any]:
    """The tensors that the checkpoint holds, or under ZeRO 3 what `contiguous()` makes them. Raises UserError, before
    anything is loaded, for one that holds code."""
    import torch

    from jobs.train.pickled import foreign_code

    if (foreign := foreign_code(sorted(checkpoint.glob("*.pt")))) is not None:
        raise UserError(f"{foreign}: no training of fot wrote that, and nothing of it was loaded")
    if not any(checkpoint.glob("*_optim_states.pt")):  # with DeepSpeed's loss scaler in it, which torch alone refuses
        return dict(torch.load(checkpoint / WEIGHTS, map_location="cpu", mmap=True, weights_only=False)["module"])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the import has something to say, too
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(
            get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
        )
