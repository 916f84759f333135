"""The Focused Transformer (arXiv 2307.03170) in any LLaMA. Needs torch and transformers (which brings safetensors),
nothing else of this repository.

- The model: `config` (which layers are memory layers), `layer` (their attention), `loss` (head and loss), `modeling`
  (the whole).
- Training: `plan` (who sees whom), `cross_batch` (attention to additional contexts), `gather` (those of other ranks).
- Reading: `reading` (inputs of any length, in windows), `cache` (local context and memory), `memory` (what left the
  local context), `cache_file` (kept on disk).
- Beneath both: `attention` (parts of one softmax), `rope` (positions turned, and turned back).
- Weights: `checkpoint` (nothing missing, nothing left over), `adapter` (what was trained, apart from its base).
- Measured: `mass` (what attention goes to a document's own tokens), `ablation` (what a layer's far attention is worth).
"""

from transformers import AutoConfig, AutoModelForCausalLM

from fot_model.adapter import Adapter, Lora, fingerprint
from fot_model.cache import FotCache
from fot_model.config import FotLlamaConfig, LongLlamaConfig, default_mem_layers
from fot_model.mass import attention_mass, key_mass, memory_mass
from fot_model.memory import DenseMemory, TopKMemory
from fot_model.modeling import FotLlamaForCausalLM, LongLlamaForCausalLM
from fot_model.plan import c_prev_plan, check_plan, cross_batch_plan, longllama_plan, pad_plan

AutoConfig.register(FotLlamaConfig.model_type, FotLlamaConfig)
AutoConfig.register(LongLlamaConfig.model_type, LongLlamaConfig)
AutoModelForCausalLM.register(FotLlamaConfig, FotLlamaForCausalLM)
AutoModelForCausalLM.register(LongLlamaConfig, LongLlamaForCausalLM)

__all__ = [
    "Adapter",
    "DenseMemory",
    "FotCache",
    "FotLlamaConfig",
    "FotLlamaForCausalLM",
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "Lora",
    "TopKMemory",
    "attention_mass",
    "c_prev_plan",
    "check_plan",
    "cross_batch_plan",
    "default_mem_layers",
    "fingerprint",
    "key_mass",
    "longllama_plan",
    "memory_mass",
    "pad_plan",
]
