"""`fot plan`: what a recipe's trainings take, by the formulas of `jobs/train/estimate.py`.

Starts neither torch nor Ray, and reads no more than the recipe and the base checkpoint's configuration (config.json, or
a GGUF file's header), which of a hub's repository is fetched where the recipe does not say the shape.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.config.checkpoint_name import kind_of
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.training import (
    Draw,
    FotObjective,
    MemorizingObjective,
    Objective,
    OwnObjective,
    Resources,
    StandardObjective,
    Switch,
    Training,
    TransformerXlObjective,
)
from jobs.models.backward import Backward
from jobs.models.base import check_config
from jobs.models.checkpoint_source import locate, read_source_config
from jobs.models.layers import seeing_layers
from jobs.models.shape import Shape
from jobs.train.estimate import (
    DEVICES,
    Device,
    checkpoint_bytes,
    contexts_seen,
    device_memory,
    find_device,
    peak_flops,
    step_flops,
    tokens_per_step,
)
from pipelines.workflow.errors import UserError

ROOM = 0.9  # share of a device's memory that may be planned for; CUDA's context and fragments take some


def show_plan(path: Path, overrides: Sequence[str], device_name: str, mfu: float) -> None:
    """Print the plan of each training. Raises UserError for an unknown device, and a base whose shape nothing tells."""
    recipe = load_recipe(path, overrides)
    if (device := find_device(device_name)) is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UserError(f"--device {device_name}: its peak is not known here; give one of {known}")
    shape = base_shape(recipe)
    for name, training in recipe.trainings.items():
        print(f"{recipe.name}, {name}: {_how(training, recipe.resources)}")
        for line in training_view(shape, training, recipe.resources, device, mfu):
            print(f"  {line}")


def base_shape(recipe: Recipe) -> Shape:
    """Shape of the recipe's base: the checkpoint's own where it is here, else as the recipe says it."""
    base = recipe.base
    if base.pretrain is not None:
        return Shape.of({**base.pretrain.shape.model_dump(), "vocab_size": _vocabulary(recipe)})
    assert base.checkpoint is not None, "a recipe has one of the two"
    if not _is_here(base.checkpoint):
        if base.shape is not None:
            return Shape.of(base.shape.model_dump())
        if kind_of(base.checkpoint) in ("path", "registered"):
            raise UserError(
                f"base.checkpoint {base.checkpoint} has no config.json, so its shape is unknown: download it or set "
                f"base.shape"
            )
    located = locate(base.checkpoint, base.revision)
    config = read_source_config(located)
    check_config(located.named, config, base.shape)
    return Shape.of(config)


def _is_here(checkpoint: str) -> bool:
    """Whether a checkpoint is a path on this machine with a configuration."""
    path = Path(checkpoint).expanduser()
    return path.is_file() or (path / "config.json").exists()


def _vocabulary(recipe: Recipe) -> int:
    """Tokens of a base that is pre-trained here; a tokenizer that is trained here may come to fewer."""
    if recipe.tokenizer.path is None:
        return recipe.tokenizer.vocab_size
    file = Path(recipe.tokenizer.path).expanduser() / "tokenizer.json"
    if not file.exists():
        raise UserError(f"tokenizer.path: {file} is not there, so the vocabulary is unknown: download the tokenizer")
    from tokenizers import Tokenizer

    return int(max(Tokenizer.from_file(str(file)).get_vocab().values())) + 1


def _how(training: Training, resources: Resources) -> str:
    settings = training.deepspeed
    kind = "GPU" if resources.gpus_per_worker else "CPU"
    parts = [f"{resources.workers} {kind} workers", f"ZeRO {settings.zero_stage}", settings.dtype]
    parts += ["optimizer offloaded"] * settings.offload_optimizer + [
        "parameters offloaded"
    ] * settings.offload_parameters
    parts += ["activation checkpointing"] * settings.activation_checkpointing
    if resources.ranks_per_micro_batch > 1:
        parts.append(f"a micro-batch over {resources.ranks_per_micro_batch} workers")
    return ", ".join(parts)


def training_view(shape: Shape, training: Training, resources: Resources, device: Device, mfu: float) -> Iterator[str]:
    """A training's parameters, tokens, FLOPs, hours; its memory at each ZeRO stage, the recipe's marked."""
    objective, layers, steps = training.objective, shape.num_hidden_layers, training.steps
    back = Backward.of(shape, training)
    seen = _seen(objective, steps, len(seeing_layers(objective, layers)), layers)
    flops, tokens = step_flops(shape, training), tokens_per_step(training)
    peak = peak_flops(device.name, training.deepspeed.dtype)
    assert peak is not None, "the device is known"
    device_hours = flops * steps / (peak * mfu) / 3600
    yield f"parameters   {back.parameters:,} ({_short(back.parameters)})"
    if not training.whole:
        yield f"trained      {_trained(training, back)}"
    yield f"tokens       {tokens:,} a step, {_short(tokens * steps)} in {steps:,} steps"
    yield f"contexts     of {objective.context} tokens; {seen}"
    yield f"FLOPs        {flops:.3g} a step, {flops * steps:.3g} in all"
    yield (
        f"time         {_time(device_hours / resources.workers)}, {device_hours:.3g} device-hours, on "
        f"{resources.workers} x {device.name} ({peak / 1e12:g} TFLOP/s, MFU {mfu:g})"
    )
    memories = {stage: device_memory(shape, training, resources, stage) for stage in range(4)}
    own = memories[training.deepspeed.zero_stage]
    yield f"host memory  {own.host / 1e9:.1f} GB, all workers together"
    yield f"checkpoint   {_size(checkpoint_bytes(shape, training))}"
    yield f"memory per {device.name} ({device.memory:g} GB; fits: up to {ROOM:.0%}), in GB:"
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "peak", "total")
    yield "  ".join([" " * 7, *names, "fits"])
    for stage, memory in memories.items():
        cells = [f"{getattr(memory, name) / 1e9:{len(name)}.1f}" for name in names]
        fits = "yes" if memory.total <= ROOM * device.memory * 1e9 else "no"
        yield "  ".join([f"ZeRO {stage}{'*' if memory is own else ' '}", *cells, fits])


def _trained(training: Training, back: Backward) -> str:
    """How much of the model is trained, and how far the backward pass goes."""
    layers, count = back.shape.num_hidden_layers, back.trained_parameters
    lora = "" if training.lora is None else f" by LoRA of rank {training.lora.rank} in {len(back.pairs)} matrices"
    where = f"{layers - back.lowest} of {layers} layers" if back.lowest < layers else "no layer"
    return f"{count:,} ({_short(count)}){lora}; the backward pass goes through {where}"


def _seen(objective: Objective, steps: int, memory: int, layers: int) -> str:
    """What a context sees besides itself."""
    match objective:
        case StandardObjective():
            return "each sees itself"
        case TransformerXlObjective():
            d = "0 or 1"
        case OwnObjective(kind=kind):
            d = f"what {kind} says"
        case MemorizingObjective(contexts=contexts):
            d = ", ".join(map(str, range(contexts)))
        case FotObjective(segments=segments) if segments is not None:
            d = ", ".join(str(positives + negatives) for positives, negatives in segments)
        case FotObjective(d=Switch(first=first, until=until, then=then)):
            d = f"{first}, from step {until} on {then}"
        case FotObjective(d=Draw(of=of)):
            d = " or ".join(map(str, of))
        case FotObjective(d=constant):
            d = str(constant)
    mean = contexts_seen(objective, steps)
    return f"d = {d}: {mean:.3g} additional ones on average, in {memory} of {layers} layers"


def _size(count: float) -> str:
    """Bytes: 56_600_000 -> '56.6 MB'."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _short(count: float) -> str:
    """3426473600 -> '3.43 B'."""
    power = next((power for power in (12, 9, 6, 3) if count >= 10**power), 0)
    return f"{count / 10**power:.3g}{({12: ' T', 9: ' B', 6: ' M', 3: ' K'}).get(power, '')}"


def _time(hours: float) -> str:
    """5.2 -> '5.2 hours', 0.1 -> '6 minutes'."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.3g} seconds"
