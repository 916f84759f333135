"""The Focused Transformer (arXiv 2307.03170) in any LLaMA. Needs torch and transformers, nothing else."""

from transformers import AutoConfig, AutoModelForCausalLM

from fot_model.config import FotLlamaConfig, default_mem_layers
from fot_model.cross_batch import cross_batch_plan
from fot_model.memory import DenseMemory
from fot_model.modeling import FotLlamaForCausalLM

AutoConfig.register(FotLlamaConfig.model_type, FotLlamaConfig)
AutoModelForCausalLM.register(FotLlamaConfig, FotLlamaForCausalLM)

__all__ = [
    "DenseMemory",
    "FotLlamaConfig",
    "FotLlamaForCausalLM",
    "cross_batch_plan",
    "default_mem_layers",
]
