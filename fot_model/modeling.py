"""A LLaMA whose memory layers see beyond the local context.

Training: `model(input_ids, labels=..., plan=plan)` with rows of contexts and a CrossBatch plan (`cross_batch.py`).
Reading: `model(window, memory=memory)` for one window after the other; each window attends to its own causal context
and to everything in memory, in one softmax, and is then added to the memory (`memory.py`).
With neither, it is the plain LLaMA it was loaded from.

Shapes: B batch (R rows of contexts in training), L local tokens, H query heads, Hk key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from fot_model.config import FotLlamaConfig
from fot_model.cross_batch import cross_batch_attention
from fot_model.memory import DenseMemory, merge, partial_attention, repeat_heads


class FotAttention(LlamaAttention):
    """A memory layer's attention. Same parameters as a LLaMA's, so checkpoints go both ways.

    `rope_scale`: what the kind of RoPE multiplies rotated queries and keys with (YaRN, longrope), 1 otherwise.
    """

    def __init__(self, config: FotLlamaConfig, layer_idx: int, rope_scale: float) -> None:
        super().__init__(config, layer_idx)
        self.rope_scale = rope_scale if config.mem_positionals else 1.0

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        plan: Tensor | None = None,
        memory: DenseMemory | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None, "LlamaModel always gives them"
        cos, sin = position_embeddings
        if not self.config.mem_positionals:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        if plan is None and memory is None:
            return super().forward(hidden_states, (cos, sin), attention_mask, past_key_values, **kwargs)

        B, L, _ = hidden_states.shape
        q_BHLD = self.q_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        k_BHkLD = self.k_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        v_BHkLD = self.v_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        far_k_BHkLD = k_BHkLD * self.rope_scale  # the rotation of position 0
        q_BHLD, k_BHkLD = apply_rotary_pos_emb(q_BHLD, k_BHkLD, cos, sin)

        heads = q_BHLD.shape[1]
        k_BHLD, v_BHLD = repeat_heads(k_BHkLD, heads), repeat_heads(v_BHkLD, heads)
        if plan is not None:
            out_BHLD = cross_batch_attention(
                q_BHLD, k_BHLD, v_BHLD, repeat_heads(far_k_BHkLD, heads), plan, self.scaling
            )
        else:
            assert memory is not None
            attended = partial_attention(q_BHLD, k_BHLD, v_BHLD, self.scaling, causal=True)
            if (remembered := memory.attend(self.layer_idx, q_BHLD, self.scaling)) is not None:
                attended = merge(attended, remembered)
            memory.append(self.layer_idx, far_k_BHkLD, v_BHkLD)
            out_BHLD = attended[0]
        return self.o_proj(out_BHLD.transpose(1, 2).reshape(B, L, -1)), None


class FotLlamaForCausalLM(LlamaForCausalLM):
    """`FotLlamaForCausalLM.from_pretrained(path_or_hub_id, mem_layers=[...])` loads any LLaMA checkpoint.

    Forward takes, besides a LLaMA's arguments, `plan` (a CrossBatch plan [R, d]; every row is one context) or
    `memory` (a `DenseMemory`, attended to and appended to). Raises ValueError for both at once, for padding or
    past_key_values with either, and for a memory layer that is not there.
    """

    config_class = FotLlamaConfig

    def __init__(self, config: FotLlamaConfig) -> None:
        super().__init__(config)
        config.mem_layers = sorted(set(config.mem_layers or []))  # from_pretrained sets it as given
        if bad := [layer for layer in config.mem_layers if not 0 <= layer < config.num_hidden_layers]:
            raise ValueError(
                f"mem_layers {bad} out of range: the model has {config.num_hidden_layers} layers, "
                f"0 to {config.num_hidden_layers - 1}"
            )
        for layer in config.mem_layers:
            self.model.layers[layer].self_attn = FotAttention(config, layer, self.model.rotary_emb.attention_scaling)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        plan: Tensor | None = None,
        memory: DenseMemory | None = None,
        **kwargs: Any,
    ) -> Any:
        if plan is not None or memory is not None:
            if plan is not None and memory is not None:
                raise ValueError("plan (training) and memory (reading) exclude each other: give one")
            if past_key_values is not None:
                raise ValueError("past_key_values with plan or memory: the memory holds the past")
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("padding with plan or memory: give rows of equal length without padding")
            attention_mask, use_cache = None, False
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            plan=plan,
            memory=memory,
            **kwargs,
        )
