"""DeepSpeed's engine for a training: ZeRO stage, number type, offload."""

from typing import Any

import deepspeed
import torch

from jobs.config.training import Training
from jobs.train.optimizer import make_optimizer
from pipelines.workflow.errors import UserError


def make_engine(model: torch.nn.Module, training: Training, accumulation: int) -> Any:
    """The model under DeepSpeed; `accumulation` micro-batches of a rank make a step.

    Raises UserError where the machine lacks the number type.
    """
    # On CPU DeepSpeed would compile its shared-memory op for over a minute; gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    settings = training.deepspeed
    accelerator = deepspeed.get_accelerator()
    if settings.dtype == "float16" and not accelerator.is_fp16_supported():
        raise UserError(
            f"deepspeed.dtype float16: this {accelerator.device_name()} cannot train with it: set bfloat16 or float32"
        )
    optimizer = make_optimizer(model, training.optimizer)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for its own statistics only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled for minutes
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "fp16": {"enabled": settings.dtype == "float16"},
        "steps_per_print": 2**31,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_step(engine: Any) -> float | None:
    """Apply the gradients, at the last micro-batch of a step. Returns their norm before clipping (of all ranks, without
    the loss scale); None at other micro-batches, and where float16's loss scale was too large and is lowered.

    Where the norm is no number the weights may be none afterwards: go back to a checkpoint.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled():
        overflows = engine.skipped_steps
        scaled = engine.fp16_enabled() and not engine.zero_optimization()  # its norm is with the loss scale
        scale = engine.optimizer.cur_scale if scaled else 1.0
        engine.step()
        overflowed = engine.fp16_enabled() and engine.skipped_steps > overflows
        return None if overflowed else float(engine.get_global_grad_norm()) / scale
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    engine.step()
    return norm
