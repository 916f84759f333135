"""Attention mass on positives, r_d (paper, section 4.2): what tells whether a memory layer finds its own document.

In a memory layer, r_d is the attention mass on additional contexts of the own document divided by the mass on all of
them; a model that does not tell documents apart gives each of d equal contexts 1/d. The layers' inputs are caught by
hooks while the context manager is open, so it costs nothing when it is not. `attention_mass` measures in training, on
rows and their plan; `memory_mass` in reading, on what is in memory. `key_mass` measures any LLaMA in full attention:
the mass of some queries on keys that are named for each.

Shapes: B batch, R rows, F rows of all ranks (R on one), L tokens a context, N tokens of additional contexts, M keys, H
query heads, Hk key/value heads, G = H / Hk, D head size, C hidden size, Q some of the queries, S sets of keys.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model.attention import attend, wide_dtype
from fot_model.cache import FotCache
from fot_model.gather import gather_rows
from fot_model.layer import CrossBatch, FotAttention

QUERIES_AT_ONCE = 256  # bounds the scores: [H, 256, M]
KEYS_AT_ONCE = 4096  # of memory


@dataclass
class Mass:
    """By head [H], summed over all queries since the start: softmax mass on the additional contexts' tokens of the
    query's own document (`positive`) and on all additional contexts (`additional`)."""

    positive: Tensor | float = 0.0
    additional: Tensor | float = 0.0

    def share(self) -> Tensor:
        """r_d by head [H]; NaN where no additional context was seen."""
        return torch.as_tensor(self.positive) / torch.as_tensor(self.additional)


@dataclass
class AttentionMass:
    """The masses by layer."""

    layers: dict[int, Mass] = field(default_factory=dict)

    def r_d(self) -> dict[int, float]:
        """r_d by layer, over all heads; NaN where no additional context was seen."""
        return {
            layer: float(torch.as_tensor(mass.positive).sum() / torch.as_tensor(mass.additional).sum())
            for layer, mass in self.layers.items()
        }


@contextmanager
def attention_mass(
    model: PreTrainedModel, documents: Tensor, layers: Sequence[int] | None = None
) -> Iterator[AttentionMass]:
    """While open, every forward pass with a plan adds its attention mass.

    `documents`: the document of every token [R, L], or of every row [R]. `layers`: by default all memory layers. Raises
    ValueError for a layer that is no memory layer.

    Where the rows are spread over ranks, all of them open it, each with its own rows' documents, and each finds the
    mass of its own rows.
    """
    found = AttentionMass({layer: Mass() for layer in _chosen(model, layers)})

    def add(attention: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        assert isinstance(attention, FotAttention)
        recomputed = torch._C._current_graph_task_id() != -1  # gradient checkpointing, in the backward pass
        if (cross_batch := inputs.get("cross_batch")) is not None and not recomputed:
            if cross_batch.objective == "transformer_xl":
                raise ValueError("attention_mass with transformer_xl: it has no additional contexts to tell apart")
            hidden_RLC = inputs["hidden_states"].detach()
            if documents.shape not in (hidden_RLC.shape[:1], hidden_RLC.shape[:2]):
                R, L = hidden_RLC.shape[:2]
                raise ValueError(f"documents {list(documents.shape)}: give one for each row [{R}], or token [{R}, {L}]")
            documents_RL = documents if documents.dim() == 2 else documents[:, None].expand(hidden_RLC.shape[:2])
            mass = found.layers[attention.layer_idx]
            positive_H, additional_H = _mass(
                attention, hidden_RLC, inputs["position_embeddings"], cross_batch, documents_RL
            )
            mass.positive, mass.additional = mass.positive + positive_H, mass.additional + additional_H

    with _hooked(model, found.layers, add):
        yield found


@contextmanager
def memory_mass(
    model: PreTrainedModel, positive: range, layers: Sequence[int] | None = None
) -> Iterator[AttentionMass]:
    """While open, every pass that reads with a memory adds what its tokens give to it.

    `positive`: which tokens of the memory are of the query's own document, one after another. `layers`: by default all
    memory layers. All of memory counts, as a `DenseMemory` attends to it, also where a top-k memory is read with. The
    softmax is the layer's: one over local context and memory; with a gate, memory's own. Keys are taken a block at a
    time, so there are no weights of all of memory at once.

    Raises ValueError for a layer that is no memory layer, and for padding.
    """
    found = AttentionMass({layer: Mass() for layer in _chosen(model, layers)})

    def add(attention: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        assert isinstance(attention, FotAttention)
        cache = inputs.get("past_key_values")
        if isinstance(cache, FotCache) and len(cache.memory):
            mass = found.layers[attention.layer_idx]
            positive_H, memory_H = _memory_mass(
                attention, inputs["hidden_states"], inputs["position_embeddings"], cache, positive
            )
            mass.positive, mass.additional = mass.positive + positive_H, mass.additional + memory_H

    with _hooked(model, found.layers, add):
        yield found


@contextmanager
def key_mass(model: PreTrainedModel, queries_Q: Tensor, keys_SQL: Tensor) -> Iterator[dict[int, Tensor]]:
    """While open, a forward pass of one row in full attention finds, for each layer, the softmax mass [S, H, Q] of
    these queries on each set of keys (float64, on the CPU).

    `queries_Q`: their positions; `keys_SQL`: for each set and query, which of the row's keys belong to it (bool). A
    layer at a time computes the scores [H, Q, L] of these queries, and no others.

    Raises ValueError for more than one row, and for another length than the keys'.
    """
    found: dict[int, Tensor] = {}

    def add(attention: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        assert isinstance(attention, FotAttention)
        assert attention.layer_idx is not None, "transformers numbers a model's layers"
        hidden_BLC = inputs["hidden_states"]
        if hidden_BLC.shape[:2] != (1, keys_SQL.shape[2]):
            raise ValueError(f"key_mass: give one row of {keys_SQL.shape[2]} tokens, not {list(hidden_BLC.shape[:2])}")
        found[attention.layer_idx] = _key_mass(
            attention, hidden_BLC, inputs["position_embeddings"], queries_Q, keys_SQL
        )

    with _hooked(model, range(model.config.num_hidden_layers), add):
        yield found


@torch.no_grad()
def _key_mass(
    attention: FotAttention,
    hidden_1LC: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    queries_Q: Tensor,
    keys_SQL: Tensor,
) -> Tensor:
    unturned_q, unturned_k, _ = attention.project(hidden_1LC)
    q_BHLD, k_BHkLD = apply_rotary_pos_emb(unturned_q, unturned_k, *attention.angles(position_embeddings))
    G, device = q_BHLD.shape[1] // k_BHkLD.shape[1], q_BHLD.device
    keys_HDL = k_BHkLD[0].float().repeat_interleave(G, 0).transpose(-1, -2)
    places_L, parts = torch.arange(hidden_1LC.shape[1], device=device), []
    for some_Q, sets_SQL in zip(
        queries_Q.to(device).split(QUERIES_AT_ONCE), keys_SQL.split(QUERIES_AT_ONCE, dim=1), strict=True
    ):
        scores_HQL = q_BHLD[0, :, some_Q].float() @ keys_HDL * attention.scaling
        weights_HQL = scores_HQL.masked_fill_(places_L > some_Q[:, None], -torch.inf).softmax(-1)
        parts.append(torch.einsum("hql,sql->shq", weights_HQL, sets_SQL.to(device, weights_HQL.dtype)))
    return torch.cat(parts, dim=2).double().cpu()


def _chosen(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int]:
    chosen = list(model.config.mem_layers) if layers is None else list(layers)
    if wrong := [layer for layer in chosen if layer not in model.config.mem_layers]:
        raise ValueError(f"layers {wrong} are no memory layers: those are {model.config.mem_layers}")
    return chosen


@contextmanager
def _hooked(model: PreTrainedModel, layers: Iterable[int], add: Callable[..., None]) -> Iterator[None]:
    """`add` is called before each of these layers' attentions."""
    with ExitStack() as hooks:
        for layer in layers:
            attention = model.model.layers[layer].self_attn
            hooks.callback(attention.register_forward_pre_hook(add, with_kwargs=True).remove)
        yield


@torch.no_grad()
def _memory_mass(
    attention: FotAttention,
    hidden_BLC: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cache: FotCache,
    positive: range,
) -> tuple[Tensor, Tensor]:
    """Mass on the positive tokens and on all of memory, by head [H]: exp of differences of log-sum-exps."""
    state, layer = cache.memory.state_dict(), attention.layer_idx
    if cache.seen_BL is not None or f"{layer}.seen" in state:
        raise ValueError("memory_mass with padding: read rows of equal length")
    unturned_q, unturned_k, v_BHkLD = attention.project(hidden_BLC)
    turned = apply_rotary_pos_emb(unturned_q, unturned_k, *attention.angles(position_embeddings))
    q_BHLD, k_BHkLD = (x.to(v_BHkLD.dtype) for x in turned)
    near_q_BHLD = q_BHLD
    if cache.angles is not None:  # queries and keys of the local context are ahead of those of the memory
        cos, sin = position_embeddings
        ahead = attention.angles((cache.angles[0].to(cos), cache.angles[1].to(sin)))
        near_q_BHLD, k_BHkLD = (x.to(v_BHkLD.dtype) for x in apply_rotary_pos_emb(unturned_q, unturned_k, *ahead))
    memory_BHkMD = state[f"{layer}.keys"]
    own_BHL = _log_sum_exp(attention, q_BHLD, memory_BHkMD[:, :, positive.start : positive.stop])
    others_BHL = torch.logaddexp(
        _log_sum_exp(attention, q_BHLD, memory_BHkMD[:, :, : positive.start]),
        _log_sum_exp(attention, q_BHLD, memory_BHkMD[:, :, positive.stop :]),
    )
    memory_BHL = total_BHL = torch.logaddexp(own_BHL, others_BHL)
    if attention.mem_gate is None:
        total_BHL = torch.logaddexp(total_BHL, attend(near_q_BHLD, k_BHkLD, k_BHkLD, attention.scaling, causal=True)[1])
        if cache.layers[layer].get_seq_length():
            total_BHL = torch.logaddexp(total_BHL, _log_sum_exp(attention, near_q_BHLD, cache.layers[layer].keys))
    positive_H, memory_H = ((lse - total_BHL).double().exp().sum((0, 2)).cpu() for lse in (own_BHL, memory_BHL))
    return positive_H, memory_H


def _log_sum_exp(attention: FotAttention, q_BHLD: Tensor, k_BHkMD: Tensor) -> Tensor:
    """Of the scores with these keys, [B, H, L]; -inf where there are none."""
    lse_BHL = q_BHLD.new_full(q_BHLD.shape[:3], -torch.inf, dtype=wide_dtype(q_BHLD))
    for start in range(0, k_BHkMD.shape[2], KEYS_AT_ONCE):
        keys = k_BHkMD[:, :, start : start + KEYS_AT_ONCE].to(q_BHLD.dtype)
        lse_BHL = torch.logaddexp(lse_BHL, attend(q_BHLD, keys, keys, attention.scaling)[1])
    return lse_BHL


@torch.no_grad()
def _mass(
    attention: FotAttention,
    hidden_RLC: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cross_batch: CrossBatch,
    documents_RL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mass on positives and on all additional contexts, by head [H]; some queries of a row at a time."""
    unturned_q, unturned_k, _ = attention.project(hidden_RLC)
    q_RHLD, k_RHkLD = apply_rotary_pos_emb(unturned_q, unturned_k, *attention.angles(position_embeddings))
    far_k_FHkLD, documents_FL = unturned_k * attention.rope_scale, documents_RL
    if cross_batch.ranks is not None:
        far_k_FHkLD = gather_rows(far_k_FHkLD, cross_batch.ranks)
        documents_FL = gather_rows(documents_RL.to(hidden_RLC.device), cross_batch.ranks)
    documents_RL, documents_FL = (each.to(hidden_RLC.device) for each in (documents_RL, documents_FL))
    L, G = q_RHLD.shape[2], q_RHLD.shape[1] // k_RHkLD.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=q_RHLD.device).tril()
    positive_H = torch.zeros(q_RHLD.shape[1], dtype=torch.float64)
    additional_H = torch.zeros_like(positive_H)
    for row, seen in enumerate(cross_batch.plan.tolist()):
        others = [other for other in seen if other >= 0]
        if not others:
            continue
        own_LL = causal_LL
        if cross_batch.document_ids is not None:
            ids_L = cross_batch.document_ids[row].to(q_RHLD.device)
            own_LL = causal_LL & (ids_L[:, None] == ids_L[None, :])
        keys_HkMD = torch.cat([k_RHkLD[row], *(far_k_FHkLD[other] for other in others)], dim=1)
        keys_HDM = keys_HkMD.repeat_interleave(G, 0).transpose(-1, -2)
        gated = attention.mem_gate is not None and cross_batch.objective == "memorizing"  # two softmaxes
        documents_N = torch.cat([documents_FL[other] for other in others])
        for first in range(0, L, QUERIES_AT_ONCE):
            some = slice(first, first + QUERIES_AT_ONCE)
            scores_HQM = (q_RHLD[row, :, some] @ keys_HDM).float() * attention.scaling
            scores_HQM[:, :, :L].masked_fill_(~own_LL[some] | gated, -torch.inf)
            weights_HQN = scores_HQM.softmax(-1)[:, :, L:]
            same_QN = documents_RL[row, some, None] == documents_N[None, :]
            positive_H += (weights_HQN * same_QN).sum((1, 2), dtype=torch.float64).cpu()
            additional_H += weights_HQN.sum((1, 2), dtype=torch.float64).cpu()
    return positive_H, additional_H
