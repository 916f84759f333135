"""The attention layer of a FoT model: plain, in training (CrossBatch) and reading (local context and memory).

Shapes: B batch (R rows of contexts in training), L tokens, d additional contexts, M keys, H query heads, Hk key/value
heads, D head size, C hidden size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from fot_model.attention import MASKED, Partial, attend, merge
from fot_model.cache import FotCache
from fot_model.cross_batch import cross_batch_attention
from fot_model.rope import turn, turn_back

TEMPERATURE = 10.0  # what a head's starts with

Objective = Literal["fot", "memorizing", "transformer_xl"]


@dataclass(frozen=True)
class CrossBatch:
    """What training tells every layer: the plan [R, d], the objective, optionally the document of each token [R, L],
    how far `transformer_xl` turns the previous context back (cosines and sines [1, 1, D]), and optionally the ranks
    whose rows the plan names."""

    plan: Tensor
    objective: Objective
    document_ids: Tensor | None
    one_context: tuple[Tensor, Tensor] | None
    ranks: ProcessGroup | None


class FotAttention(LlamaAttention):
    """Attention of a layer. Same parameters as a LLaMA's, so checkpoints go both ways; but for what the
    configuration may ask for: `mem_gate`, the Memorizing Transformer's gate, and `mem_temperature`, by which cosines of
    queries and keys are multiplied (`mem_qk_norm`), one number a head each.

    `rope_scale`: what the kind of RoPE multiplies rotated queries and keys with (YaRN, longrope), 1 otherwise.
    """

    is_memory_layer: bool
    rope_scale: float
    mem_gate: nn.Parameter | None
    mem_temperature: nn.Parameter | None

    @classmethod
    def adopt(cls, attention: LlamaAttention, rope_scale: float) -> None:
        """Make a LLaMA's attention one of this class, with the weights it has."""
        config = attention.config
        attention.__class__ = cls
        attention.is_memory_layer = attention.layer_idx in config.mem_layers
        attention.rope_scale = rope_scale if config.mem_positionals else 1.0
        gated = attention.is_memory_layer and config.mem_gate
        attention.register_parameter(
            "mem_gate", nn.Parameter(torch.zeros(config.num_attention_heads)) if gated else None
        )
        normed = attention.is_memory_layer and config.mem_qk_norm
        attention.register_parameter(
            "mem_temperature", nn.Parameter(torch.full((config.num_attention_heads,), TEMPERATURE)) if normed else None
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cross_batch: CrossBatch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None, "LlamaModel always gives them"
        cache = past_key_values if isinstance(past_key_values, FotCache) else None
        cos, sin = in_window = self.angles(position_embeddings)
        if cache is not None and cache.angles is not None:
            cos, sin = self.angles((cache.angles[0].to(cos), cache.angles[1].to(sin)))
        if cross_batch is not None and (self.is_memory_layer or cross_batch.objective == "transformer_xl"):
            out_BHLD = self._train(hidden_states, cos, sin, cross_batch)
        elif self.is_memory_layer and cache is not None and len(cache.memory):
            out_BHLD = self._read(hidden_states, cos, sin, in_window, cache)
        elif self.mem_temperature is not None:
            return self._plain(hidden_states, cos, sin, attention_mask, past_key_values, **kwargs)
        else:
            return super().forward(hidden_states, (cos, sin), attention_mask, past_key_values, **kwargs)
        return self.o_proj(out_BHLD.transpose(1, 2).flatten(2)), None

    def angles(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this layer: those of position 0 where memory layers have no positions."""
        cos, sin = position_embeddings
        if self.is_memory_layer and not self.config.mem_positionals:
            return torch.ones_like(cos), torch.zeros_like(sin)
        return cos, sin

    def project(self, hidden_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, L, D], keys and values [B, Hk, L, D], without positions. With `mem_qk_norm` keys are of unit
        length, and queries as long as makes their scores temperature x cosine."""
        B, L, _ = hidden_BLC.shape
        q, k, v = (
            proj(hidden_BLC).reshape(B, L, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.mem_temperature is not None:
            length_H1 = (self._own(self.mem_temperature, q.shape[2]) / self.scaling)[:, None].to(q.dtype)
            q, k = unit(q) * length_H1, unit(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _own(self, of_heads_H: Tensor, heads: int) -> Tensor:
        """Of the query heads that this rank has: all, but under tensor parallelism."""
        if heads == len(of_heads_H):
            return of_heads_H
        if of_heads_H.requires_grad and torch.is_grad_enabled():  # each rank would learn its own heads' alone
            raise ValueError(
                "tensor parallelism does not train mem_gate and mem_qk_norm: freeze them (requires_grad_(False)), read "
                "under torch.no_grad(), or train with ZeRO or FSDP"
            )
        weight: Any = self.q_proj.weight  # a DTensor
        mesh = weight.device_mesh
        return of_heads_H.chunk(len(of_heads_H) // heads)[mesh.get_local_rank(mesh.ndim - 1)]

    def _plain(
        self,
        hidden_BLC: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As a LLaMA's forward pass, with normalised queries and keys."""
        q_BHLD, keys, values = self.project(hidden_BLC)
        q_BHLD, keys = apply_rotary_pos_emb(q_BHLD, keys, cos, sin)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out_BLHD, weights = attention(
            self, q_BHLD, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out_BLHD.flatten(2)), weights

    def _train(self, hidden_RLC: Tensor, cos: Tensor, sin: Tensor, cross_batch: CrossBatch) -> Tensor:
        """CrossBatch attention [R, H, L, D]."""
        if self.training and self.attention_dropout:
            raise ValueError(
                f"attention_dropout {self.attention_dropout} with a plan: set it to 0 in the configuration"
            )
        unturned_q, unturned_k, v_RHkLD = self.project(hidden_RLC)
        # Under autocast RoPE leaves queries and keys in float32.
        q_RHLD, k_RHkLD = (x.to(v_RHkLD.dtype) for x in apply_rotary_pos_emb(unturned_q, unturned_k, cos, sin))
        far_k, far_v = unturned_k * self.rope_scale, v_RHkLD  # the rotation of position 0
        if cross_batch.objective == "transformer_xl":
            turns = self.config.mem_positionals or not self.is_memory_layer
            assert cross_batch.one_context is not None
            far_k = turn_back(k_RHkLD, *cross_batch.one_context) if turns else k_RHkLD
        return self._attend_plan((q_RHLD, k_RHkLD, v_RHkLD, far_k, far_v), cross_batch)

    @torch.compiler.disable  # a graph would be made anew for plans and documents of other shapes
    def _attend_plan(self, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], cross_batch: CrossBatch) -> Tensor:
        """CrossBatch attention of queries, keys, values, far keys and far values."""
        plan_Rd, ranks = cross_batch.plan, cross_batch.ranks
        documents_RL, differentiable = cross_batch.document_ids, cross_batch.objective == "fot"
        if self.mem_gate is None or cross_batch.objective != "memorizing":
            return cross_batch_attention(
                *tensors, plan_Rd, self.scaling, documents_RL, differentiable=differentiable, ranks=ranks
            )
        nothing_Rd = plan_Rd.new_empty(plan_Rd.shape[0], 0)
        local_RHLD = cross_batch_attention(*tensors, nothing_Rd, self.scaling, documents_RL)
        far_RHLD = cross_batch_attention(
            *tensors, plan_Rd, self.scaling, local=False, differentiable=False, ranks=ranks
        )
        has_memory_R = (plan_Rd >= 0).any(1).to(local_RHLD.device)
        return self._gated(local_RHLD, far_RHLD, has_memory_R[:, None, None, None])

    def _read(
        self, hidden_BLC: Tensor, cos: Tensor, sin: Tensor, in_window: tuple[Tensor, Tensor], cache: FotCache
    ) -> Tensor:
        """Attention [B, H, L, D] to the local context and to memory, which lies at position 0 of the window whatever
        the cache's lead."""
        unturned_q, unturned_k, v_BHkLD = self.project(hidden_BLC)
        q_BHLD, k_BHkLD = apply_rotary_pos_emb(unturned_q, unturned_k, cos, sin)
        far_q_BHLD = q_BHLD if cache.angles is None else turn(unturned_q, *in_window)
        keys, values = cache.update(k_BHkLD, v_BHkLD, self.layer_idx)
        # RoPE leaves float32 under autocast.
        q_BHLD, far_q_BHLD, keys, values = (x.to(v_BHkLD.dtype) for x in (q_BHLD, far_q_BHLD, keys, values))
        seen_B11M = None if cache.seen_BL is None else cache.seen_BL[:, None, None, :].to(q_BHLD.device)
        local = self._attend_local(q_BHLD, keys, values, seen_B11M)
        remembered = cache.memory.attend(self.layer_idx, far_q_BHLD, self.scaling)
        assert remembered is not None, "the memory is not empty"
        if self.mem_gate is None:
            return merge(local, remembered)[0].to(q_BHLD.dtype)
        return self._gated(local[0], remembered[0], remembered[1][..., None] > MASKED / 2)  # not only padding

    def _attend_local(self, q_BHLD: Tensor, keys: Tensor, values: Tensor, seen_B11M: Tensor | None) -> Partial:
        L = q_BHLD.shape[2]
        past = keys.shape[2] - L
        if L == 1:
            return attend(q_BHLD, keys, values, self.scaling, seen=seen_B11M)
        seen = (None, None) if seen_B11M is None else seen_B11M.split([past, L], dim=3)
        new = attend(q_BHLD, keys[:, :, past:], values[:, :, past:], self.scaling, causal=True, seen=seen[1])
        if not past:
            return new
        return merge(attend(q_BHLD, keys[:, :, :past], values[:, :, :past], self.scaling, seen=seen[0]), new)

    def _gated(self, local_BHLD: Tensor, far_BHLD: Tensor, has_memory: Tensor) -> Tensor:
        """The Memorizing Transformer's v = g v_mem + (1 - g) v_local, g = sigmoid(b) a head; local alone where there
        is no memory."""
        assert self.mem_gate is not None
        gate_H = self._own(self.mem_gate, local_BHLD.shape[1]).float().sigmoid()
        gate = (gate_H[:, None, None] * has_memory).to(local_BHLD.dtype)
        return gate * far_BHLD.to(local_BHLD.dtype) + (1 - gate) * local_BHLD


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, along the last dimension."""
    return functional.normalize(x.float() if x.dtype.itemsize < 4 else x, dim=-1).to(x.dtype)
