"""What a training takes: parameters, floating-point operations, memory, time. Formulas only: no torch, no weights.

**Parameters** are counted exactly.

**FLOPs** (a multiplication and an addition are two) are those of the matrix products, forward (1x) and backward (2x),
as in PaLM (arXiv 2204.02311, appendix B): 6 for each weight of a matrix product and token, and 12 Hq D in each layer
for each pair of a query and a key that it sees. What is computed again with activation checkpointing is not counted,
nor are norms, softmax, optimizer and evaluations: this is the numerator of MFU. Two things differ from PaLM's
6 N + 12 L H Q T: N leaves out norms and the embedding, which is a look-up; and of the causal local context a query sees
(T + 1) / 2 keys on average, not T. Additional contexts count whole, with 8 in place of 12 where they are not
differentiated (no gradient of their keys and values).

**Memory of a rank.** N parameters, R ranks, w bytes a number of the training's type:

    stage       weights  gradients  optimizer
    0           w N      w N        16 N      (8 N in float32)      optimizer: float32 weights, two moments, and the
    1           w N      w N        16 N / R                        gradients in float32 while a step is made
    2           w N      w N / R    16 N / R
    3           w N / R  w N / R    16 N / R

ZeRO (arXiv 1910.02054, section 3) has 2, 2 and 12 bytes for 16-bit numbers; the other 4 are DeepSpeed's float32
gradients (`estimate_zero2_model_states_mem_needs`: 2 N + 18 N / R). `offload_optimizer` moves the optimizer's share and
partitioned gradients to the host, `offload_parameters` the weights. DeepSpeed's buffers come on top, by its defaults: a
bucket of 5e8 gradients; at stage 3 up to 1e9 weights, gathered while they are used.

Activations are what autograd keeps of a micro-batch for the backward pass, for each token and layer (after arXiv
2205.05198, section 4, but for this code: no dropout, attention without a score matrix, SwiGLU, norms in float32):

    2 (4 + 2 w) C + w (2 Hq D + 2 Hk D) + 4 Hq + 4 w I

in a memory layer 2 w Hk D more for far keys and values, those of all ranks that share a micro-batch; and (4 + 2 w) C
once, for the last norm. With activation checkpointing a layer keeps w C, and one at a time is there in full. Logits are
there for some tokens at a time (`fot_model/loss.py`), at most 2^24: 4 + w bytes each, and 4 more where they are made
in 16 bits. Besides, from the loss on, gradients: C (4 + w) bytes a token and, where the head is trained, 4 C a row of
it. Not counted: CUDA's context, fragmentation, what is there for a moment within a layer's backward pass.

C hidden size, I intermediate size, Hq query heads, Hk key/value heads, D head size, T tokens of a context.
"""

import re
from dataclasses import dataclass

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
from jobs.models.layers import seeing_layers
from jobs.models.shape import Shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BUCKET = 5e8  # gradients that DeepSpeed reduces at once (reduce_bucket_size)
LIVE = 1e9  # gathered weights at ZeRO stage 3 (stage3_max_live_parameters)
LOGITS = 2**24  # at once, as fot_model.loss.ENTRIES, which would import torch


def contexts_seen(objective: Objective, steps: int) -> float:
    """Additional contexts that a row sees, on average over a group's rows and the steps; at most, for groups that share
    a document do not serve one another as negatives."""
    match objective:
        case StandardObjective():
            return 0.0
        case MemorizingObjective(contexts=contexts):
            return (contexts - 1) / 2
        case TransformerXlObjective(contexts=contexts):
            return (contexts - 1) / contexts
        case OwnObjective():
            return objective.seen
    if objective.segments is not None:
        return sum(map(sum, objective.segments)) / objective.contexts
    match objective.d:
        case Switch(first=first, until=until, then=then):
            before = min(until, steps)
            d = (first * before + then * (steps - before)) / steps
        case Draw(of=of):
            d = sum(of) / len(of)
        case int(constant):
            d = float(constant)
        case None:
            raise AssertionError("an objective has a table or d")
    return d * (objective.contexts - 1) / objective.contexts  # the first context of a group sees none


def tokens_per_step(training: Training) -> int:
    """Tokens of a step, all ranks together."""
    batch, objective = training.batch, training.objective
    return batch.micro_batches * batch.groups * objective.contexts * objective.context


def step_flops(shape: Shape, training: Training, seen: float | None = None) -> float:
    """FLOPs of a step, all ranks together. `seen`: the additional contexts that a row sees on average; if not given,
    over the whole training."""
    objective = training.objective
    if seen is None:
        seen = contexts_seen(objective, training.steps)
    back, layers, pair = Backward.of(shape, training), shape.num_hidden_layers, 12
    if not isinstance(objective, FotObjective | OwnObjective):
        pair = 8
    local = sum(12 if back.reaches_attention(layer) else 4 for layer in range(layers)) * (objective.context + 1) / 2
    far = sum(pair if back.reaches_attention(layer) else 4 for layer in seeing_layers(objective, layers))
    attention = shape.queries * (local + far * seen * objective.context)
    return tokens_per_step(training) * (back.matrix_flops() + attention)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a rank's device; `host` those of all ranks' hosts together.

    `peak`: what comes on top of all else for a moment: the loss's logits, or a layer that is computed again.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    peak: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.peak


def device_memory(shape: Shape, training: Training, resources: Resources, zero_stage: int | None = None) -> MemoryUse:
    """Memory of a training at a ZeRO stage, by default its own. What it offloads counts where the stage can offload it.
    On the host every rank first holds all weights; then there is what is offloaded."""
    settings, ranks = training.deepspeed, resources.workers
    stage = settings.zero_stage if zero_stage is None else zero_stage
    width = BYTES[settings.dtype]
    back = Backward.of(shape, training)
    count, trained = back.parameters, back.trained_parameters
    weights = width * count / (ranks if stage == 3 else 1)
    gradients = width * trained / (ranks if stage >= 2 else 1)
    optimizer = (8 if stage == 0 and width == 4 else 16) * trained / (ranks if stage >= 1 else 1)
    buffers = BUCKET * width + (min(count, LIVE) * width if stage == 3 else 0)
    offloaded = 0.0
    if settings.offload_optimizer and stage >= 1:
        # DeepSpeed keeps the weights and the accumulated gradients there in the training's type, too.
        offloaded += (16 + 2 * width) * trained
        optimizer = 0
        gradients = gradients if stage == 1 else 0
    if settings.offload_parameters and stage == 3:
        offloaded += width * count
        weights = 0
    activations, peak = _activations(shape, training, resources)
    return MemoryUse(weights, gradients, optimizer, buffers, activations, peak, max(offloaded, width * count * ranks))


def _activations(shape: Shape, training: Training, resources: Resources) -> tuple[float, float]:
    """What is kept of a micro-batch for the backward pass, and the peak on top of it."""
    objective, settings, spread = training.objective, training.deepspeed, resources.ranks_per_micro_batch
    width, layers = BYTES[settings.dtype], shape.num_hidden_layers
    tokens = training.batch.groups * objective.contexts * objective.context // spread
    far = 2 * width * shape.keys * spread
    back = Backward.of(shape, training)
    bytes_of = [
        back.layer_bytes(layer, width)
        + far * (layer in seeing_layers(objective, layers)) * back.reaches_attention(layer)
        for layer in range(layers)
    ]
    last_norm, loss = back.last_norm_bytes(width), loss_bytes(shape, tokens, width, back.trains_head)
    if settings.activation_checkpointing:
        kept = (layers - back.lowest) * width * shape.hidden_size + last_norm
        whole = Backward.of(shape, training.model_copy(update={"train": "all", "lora": None}))
        # While it is computed again a layer holds for a moment what it does not keep, too.
        layer = whole.layer_bytes(0, width) + far * bool(seeing_layers(objective, layers))
        return tokens * kept, max(loss, tokens * layer)
    return tokens * (sum(bytes_of) + last_norm), loss


def loss_bytes(shape: Shape, tokens: int, width: int, trains_head: bool = True) -> int:
    """Bytes of the head's logits and gradients while the loss of so many tokens is found."""
    logits = min(tokens, max(1, LOGITS // shape.vocab_size)) * shape.vocab_size
    gradients = shape.hidden_size * (tokens * (4 + width) + 4 * shape.vocab_size * trains_head)
    return logits * (8 if width == 4 else 10) + gradients


def checkpoint_bytes(shape: Shape, training: Training) -> float:
    """Bytes of a checkpoint: what is trained, in float32 with two moments under ZeRO, and at stages 0 to 2 once more
    in the training's type."""
    settings = training.deepspeed
    width, stage = BYTES[settings.dtype], settings.zero_stage
    moments = 8 if stage == 0 and width == 4 else 12
    return (moments + (width if stage < 3 else 0)) * Backward.of(shape, training).trained_parameters


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet: dense peaks in TFLOP/s (`half`: bfloat16 and float16 with float32 sums;
    `single`: float32 without TF32, torch's default) and memory in GB. `words` are all in torch's name of it."""

    name: str
    words: frozenset[str]
    half: float
    single: float
    memory: float


def _device(name: str, half: float, single: float, memory: float, words: str | None = None) -> Device:
    return Device(name, frozenset((words or name).lower().split()), half, single, memory)


# NVIDIA's data sheets of each product and, for GeForce and RTX, its architecture white papers; where a sheet gives
# tensor cores with sparsity only, half of it. The first whose words fit counts.
DEVICES = (
    _device("B200", 2250, 75, 180),
    _device("H200 NVL", 835, 60, 141),
    _device("H200 SXM", 989, 67, 141, "h200"),
    _device("H100 PCIe", 756, 51, 80),
    _device("H100 NVL", 835, 60, 94),
    _device("H100 SXM", 989, 67, 80, "h100"),
    _device("GH200", 989, 67, 96),
    _device("A100 40GB", 312, 19.5, 40),
    _device("A100 80GB", 312, 19.5, 80, "a100"),
    _device("L40S", 362, 91.6, 48),
    _device("L40", 181, 90.5, 48),
    _device("L4", 121, 30.3, 24),
    _device("A40", 149.7, 37.4, 48),
    _device("A10", 125, 31.2, 24),
    _device("RTX A6000", 154.8, 38.7, 48),
    _device("RTX 5090", 209.5, 104.8, 32, "5090"),
    _device("RTX 4090", 165.2, 82.6, 24, "4090"),
    _device("RTX 3090", 71, 35.6, 24, "3090"),
)
OTHERS = {"mig", "laptop", "d", "ti"}  # slices and variants of these devices, with peaks of their own


def find_device(name: str) -> Device | None:
    """The device of a name: torch.cuda.get_device_name()'s, or a part of it ("H100", "A100 40GB")."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((device for device in DEVICES if device.words <= words and not words & OTHERS), None)


def peak_flops(name: str, dtype: str) -> float | None:
    """A device's peak FLOP/s in a number type, None where the device is unknown. `name`: as `find_device` takes it."""
    device = find_device(name)
    return None if device is None else 1e12 * (device.single if dtype == "float32" else device.half)
