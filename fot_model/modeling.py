"""A LLaMA whose memory layers see beyond the local context.

Training: `model(input_ids, labels=..., plan=plan)` with rows of contexts and a plan of who sees whom (`plan.py`).
Reading: `model(input_ids)` and `model.generate(...)` with inputs of any length. They go through the local context in
windows; what leaves it goes to the memory of the memory layers (`cache.py`, `memory.py`).
With neither plan nor memory, it is the plain LLaMA it was loaded from.

Shapes: B batch (R rows of contexts in training), L tokens, P tokens read before, d additional contexts, C hidden size,
V vocabulary.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from transformers import Cache, LlamaForCausalLM
from transformers.generation import GenerationMode, MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from fot_model.adapter import Adapter, fingerprint
from fot_model.cache import FotCache
from fot_model.checkpoint import OUTPUT_LAYER, check_loaded
from fot_model.config import FotLlamaConfig, LongLlamaConfig
from fot_model.cross_batch import same_document
from fot_model.layer import TEMPERATURE, CrossBatch, FotAttention, Objective
from fot_model.loss import IGNORE, LmHead
from fot_model.plan import check_plan, documents_of
from fot_model.reading import check_cache, check_positions, check_rows, check_unpadded, padding, read
from fot_model.rope import rotation

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Wanted:
    """Which loss a forward pass is to give: `labels` of the tokens, or `shift_labels` of their predictions; what a mean
    is over (`items`), by default over all that have a label."""

    labels: Tensor | None
    shift_labels: Tensor | None
    items: Tensor | int | None
    reduction: Literal["mean", "none"]
    skip_logits: bool

    def shifted(self) -> Tensor:
        """What each position [B, L] is to predict."""
        if self.shift_labels is not None:
            return self.shift_labels
        assert self.labels is not None
        return functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE)


class FotLlamaForCausalLM(LlamaForCausalLM):
    """`FotLlamaForCausalLM.from_pretrained(path_or_hub_id, mem_layers=[...])` loads any LLaMA or LongLLaMA checkpoint.

    Forward takes, besides a LLaMA's arguments:

    - `plan` [R, d] (training): every row is one context, memory layers see the rows that the plan names;
    - `objective`: "fot" (CrossBatch, differentiable), "memorizing" (Memorizing Transformer: memory is not
      differentiated; with the gate if the configuration has `mem_gate`, else in one softmax), "transformer_xl" (the
      plan names the previous context, which all layers see, undifferentiated, at the positions before);
    - `document_ids` [R, L] (training; also without a plan): attention inside a row stays inside each of the documents
      joined in it, rows that the plan names are seen whole;
    - `ranks` (training): a process group over which the rows are spread. All its ranks give R rows of L tokens; rank
      i's are rows i * R to (i + 1) * R - 1, and its `plan` [R, d] names rows of any rank;
    - `last_context_length` (reading): instead of the configuration's;
    - `shift_labels` [B, L] in place of `labels`: the label of each token is what it is to predict, not the token;
    - `reduction`: "mean" over the tokens that have a label, or over `num_items_in_batch`; "none": the loss of each
      token [B, L], 0 where it has no label (-100);
    - `skip_logits`: with labels, give the loss alone; by default in training mode. Then the logits of all tokens are
      never there at once (`loss.py`), unless the head is no plain one (LoRA, quantized, tensor parallel) or
      `loss_function` another.

    Reading returns a `FotCache` as `past_key_values`. Raises ValueError for arguments that exclude each other or are
    out of range.
    """

    config_class = FotLlamaConfig

    def __init__(self, config: FotLlamaConfig) -> None:
        if not isinstance(config, FotLlamaConfig):
            raise ValueError(f"config is a {type(config).__name__}: give FotLlamaConfig(**config.to_dict())")
        super().__init__(config)
        config.check()
        for layer in self.model.layers:
            FotAttention.adopt(layer.self_attn, self.model.rotary_emb.attention_scaling)
        LmHead.adopt(self.lm_head)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        adapter: Adapter | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers does, but that nothing is left to chance: a checkpoint that lacks a parameter, holds a tensor
        more or one of another shape is refused (unless `ignore_mismatched_sizes`). `adapter`: one that was trained from
        this base, or its directory; it brings its memory layers and local context, unless they are given. Raises
        ValueError for these, and for an adapter of another base."""
        wants_info, reshapes = (kwargs.pop(name, False) for name in ("output_loading_info", "ignore_mismatched_sizes"))
        if isinstance(adapter, str | os.PathLike):
            adapter = Adapter.load(os.fspath(adapter))
        dtype = kwargs.get("dtype")
        if adapter is not None:
            settings = {} if kwargs.get("config") is not None else dict(adapter.settings)
            # In the number type of the files: what is rounded has another fingerprint.
            kwargs = {**settings, **kwargs, "dtype": "auto"}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        others = [] if reshapes else info["mismatched_keys"]
        check_loaded(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"], others)
        if OUTPUT_LAYER not in model.all_tied_weights_keys:
            model.config.tie_word_embeddings = False  # whatever the file said: it holds an output layer of its own
        if adapter is not None:
            adapter.check_base(fingerprint(model, info["missing_keys"]), pretrained_model_name_or_path)
            if dtype not in (None, "auto"):
                model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            adapter.apply(model)
            info["missing_keys"] = set(info["missing_keys"]) - set(adapter.tensors)
        return (model, info) if wants_info else model

    def _apply(self, *args: Any, **kwargs: Any) -> "FotLlamaForCausalLM":
        """As torch does; RoPE's frequencies stay float32 in a model cast to 16 bits, because keys are turned back by
        the same angles that turned them."""
        super()._apply(*args, **kwargs)
        rope, exact = self.model.rotary_emb, LlamaRotaryEmbedding(self.config)
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rope, name, getattr(exact, name).to(getattr(rope, name).device))
        return self

    def initialize_weights(self) -> None:
        """As transformers does; gates that no checkpoint brought start half open, temperatures at `TEMPERATURE`."""
        super().initialize_weights()
        for layer in self.model.layers:
            gate = getattr(layer.self_attn, "mem_gate", None)  # not there yet at a LLaMA's own initialisation
            if gate is not None and not getattr(gate, "_is_hf_initialized", False):
                nn.init.zeros_(gate)
            temperature = getattr(layer.self_attn, "mem_temperature", None)
            if temperature is not None and not getattr(temperature, "_is_hf_initialized", False):
                nn.init.constant_(temperature, TEMPERATURE)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        super().set_output_embeddings(new_embeddings)
        LmHead.adopt(new_embeddings)

    @torch.compiler.disable(recursive=False)  # looks at what it is given; what computes is compiled
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        plan: Tensor | None = None,
        objective: Objective = "fot",
        document_ids: Tensor | None = None,
        ranks: ProcessGroup | None = None,
        last_context_length: int | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        reduction: Literal["mean", "none"] = "mean",
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        check_rows(input_ids)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = [tensor for tensor in inputs.values() if tensor is not None]
        if len(given) != 1:
            raise ValueError("give either input_ids or inputs_embeds")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction {reduction!r}: give mean or none")
        B, L = given[0].shape[:2]
        wanted = None
        if labels is not None or shift_labels is not None:
            skips = self.training if skip_logits is None else skip_logits
            wanted = Wanted(labels, shift_labels, num_items_in_batch, reduction, skips)
        if L == 0 and past_key_values is not None:
            before = past_key_values.get_seq_length()
            raise ValueError(
                f"no tokens are new: put the {before} that the cache has read before them, generate() wants all"
            )
        if L == 0:
            raise ValueError("the input has no tokens: give at least one, such as the tokenizer's bos")
        heeded = not self.config.mem_layers and "flash" in (self.config._attn_implementation or "")
        if position_ids is None and document_ids is None and kwargs.get("cu_seq_lens_q") is not None and not heeded:
            raise ValueError(
                "cu_seq_lens_q alone does not tell documents apart here: give position_ids that start again at each"
            )
        if plan is None and document_ids is not None:
            plan = torch.empty(B, 0, dtype=torch.long)
        if plan is not None:
            if past_key_values is not None:
                raise ValueError("past_key_values with a plan: in training the plan's rows are the past")
            self._refuse_attentions(**kwargs)
            kwargs["cross_batch"], attention_mask = self._cross_batch(
                plan, objective, document_ids, position_ids, attention_mask, ranks, B, L
            )
            use_cache = False
        elif ranks is not None or objective != "fot":
            raise ValueError("ranks and objective belong to training: give them with a plan")
        else:
            self.config.check_last_context(last_context_length)
            if attention_mask is None and position_ids is None and input_ids is not None and past_key_values is None:
                check_unpadded(input_ids, self.config.pad_token_id, self.config.bos_token_id)
            kept_local = last_context_length or self.config.last_context_length
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            too_long = (kept_local or self.config.window) < L
            reads = self.config.mem_layers and (use_cache or past_key_values is not None or too_long)
            if reads or isinstance(past_key_values, FotCache):
                output = self._read(
                    inputs,
                    attention_mask,
                    position_ids,
                    past_key_values,
                    wanted,
                    use_cache,
                    logits_to_keep,
                    kept_local,
                    **kwargs,
                )
                return output if wants_dict else output.to_tuple()
            if self.config.mem_layers and attention_mask is not None and attention_mask.dim() == 2:
                padding(attention_mask, B, L, 0)
            if not self.config.mem_layers:
                past = 0 if past_key_values is None else past_key_values.get_seq_length()
                self._warn_without_memory(past + L, "are read in full attention, as a LLaMA does")
        output = self.model(
            **inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = self._loss_and_logits(output.last_hidden_state, logits_to_keep, wanted)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return output if wants_dict else output.to_tuple()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        form: Literal["fot_llama", "longllama"] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers does. `form` "longllama" writes the layout of the released LongLLaMA checkpoints; by default
        the class's own."""
        own = self.config.model_type
        if form not in (None, own, "longllama"):
            raise ValueError(f"form {form!r}: a {type(self).__name__} saves as {own} or longllama")
        if form is not None and kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub with form: save first, then upload the directory")
        config = LongLlamaConfig.of(self.config) if form == "longllama" else None
        super().save_pretrained(save_directory, *args, **kwargs)
        if config is not None and kwargs.get("is_main_process", True):
            config.save_pretrained(save_directory)

    def _refuse_attentions(self, **kwargs: Any) -> None:
        if self.config.mem_layers and kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions with memory: attention_mass reads out what memory layers attend to")

    @torch.compiler.disable
    def _warn_without_memory(self, length: int, what: str) -> None:
        if length > self.config.window:
            logger.warning_once(
                f"the model has no memory layers: tokens beyond its local context of {self.config.window} {what}; "
                f"mem_layers=[...] in from_pretrained gives it a memory"
            )

    @torch.compiler.disable  # it looks at values, and these are no part of a graph
    def _cross_batch(
        self,
        plan_Rd: Tensor,
        objective: Objective,
        document_ids_RL: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        ranks: ProcessGroup | None,
        R: int,
        L: int,
    ) -> tuple[CrossBatch, Tensor | None]:
        """What layers are told in training, and the mask of those that are no memory layers."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("padding with a plan: give rows of equal length without padding")
        if objective not in get_args(Objective):
            raise ValueError(f"objective {objective!r}: give one of {', '.join(get_args(Objective))}")
        if document_ids_RL is not None and document_ids_RL.shape != (R, L):
            raise ValueError(f"document_ids {list(document_ids_RL.shape)}: give [{R}, {L}], one for each token")
        rank, count = (0, 1) if ranks is None else (ranks.rank(), ranks.size())
        if position_ids is not None:
            document_ids_RL = documents_of(position_ids, document_ids_RL, R, L)
        check_plan(plan_Rd, count * R, document_ids_RL, range(rank * R, (rank + 1) * R))
        if not self.config.mem_layers and objective != "transformer_xl" and bool((plan_Rd >= 0).any()):
            raise ValueError(
                "the plan names rows, but the model has no memory layers that would see them: give mem_layers=[...] in "
                "from_pretrained, or no plan"
            )
        if objective == "transformer_xl" and plan_Rd.shape[1] > 1:
            raise ValueError(f"transformer_xl sees one context, the previous: the plan has {plan_Rd.shape[1]} columns")
        if document_ids_RL is not None and bool((document_ids_RL == document_ids_RL[:, :1]).all()):
            document_ids_RL = None  # nothing is joined: causal attention needs no mask
        one_context = None
        if objective == "transformer_xl":
            if position_ids is not None and bool((position_ids.diff(dim=1) != 1).any()):
                raise ValueError("transformer_xl with position_ids that start again: leave them out, or join nothing")
            one_context = rotation(self.model.rotary_emb, torch.full((1, 1), L, device=self.device), L)
        told = CrossBatch(plan_Rd, objective, document_ids_RL, one_context, ranks)
        return told, self._document_mask(document_ids_RL)

    def _document_mask(self, document_ids_RL: Tensor | None) -> Tensor | None:
        """What is added to the scores [R, 1, L, L] of the layers that are no memory layers: the causal mask within
        each document."""
        if document_ids_RL is None:
            return None
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"document_ids with attn_implementation {self.config._attn_implementation!r}: load with 'sdpa'"
            )
        same_R1LL = same_document(document_ids_RL.to(self.device)).tril()
        mask_R1LL = torch.zeros(same_R1LL.shape, dtype=self.dtype, device=self.device)
        return mask_R1LL.masked_fill_(~same_R1LL, torch.finfo(self.dtype).min)

    @torch.compiler.disable  # windows and memory grow with every call: each would be a graph of its own
    def _read(
        self,
        inputs: dict[str, Tensor | None],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        wanted: "Wanted | None",
        use_cache: bool,
        logits_to_keep: int | Tensor,
        kept_local: int | None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Go through the input in windows, and on from what the cache holds."""
        embeddings_BLC = inputs["inputs_embeds"]
        if embeddings_BLC is None:
            embeddings_BLC = self.get_input_embeddings()(inputs["input_ids"])
        B, L, _ = embeddings_BLC.shape
        self._refuse_attentions(**kwargs)
        if self.training and self.is_gradient_checkpointing:
            raise ValueError("memory with gradient checkpointing: call model.eval() to read, or train with a plan")
        cache = FotCache(self.config) if cache is None else check_cache(cache, B, self.config)
        past_BP, seen_BL = padding(attention_mask, B, L, cache.get_seq_length())
        check_positions(position_ids, seen_BL)
        if not self.config.mem_layers:
            self._warn_without_memory(cache.get_seq_length() + L, "are forgotten")
        if past_BP is not None:
            cache.hide(past_BP)
        wants_states = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        needed = L
        if isinstance(logits_to_keep, int) and logits_to_keep and not wants_states:
            needed = min(L, logits_to_keep)
        with cache.undone_on_failure():
            hidden_BLC, states = read(self.model, embeddings_BLC, seen_BL, cache, kept_local, needed, **kwargs)
            loss, logits = self._loss_and_logits(hidden_BLC, logits_to_keep, wanted)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=states,
        )

    def _loss_and_logits(
        self, hidden_BLC: Tensor, logits_to_keep: int | Tensor, wanted: "Wanted | None"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the positions that are kept."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BLC = hidden_BLC[:, kept]
        if wanted is None:
            return None, self.lm_head(hidden_BLC)
        labels_BL = wanted.shifted().to(hidden_BLC.device)
        if labels_BL.shape != hidden_BLC.shape[:2]:
            raise ValueError(
                f"labels {list(labels_BL.shape)}: give {list(hidden_BLC.shape[:2])}, one for each position that is kept"
            )
        in_parts = isinstance(self.lm_head, LmHead) and self.tp_size is None and not hasattr(self, "_loss_function")
        if wanted.skip_logits and in_parts:
            if wanted.reduction == "none":
                return self.lm_head(hidden_BLC, labels_BL, "none"), None
            loss = self.lm_head(hidden_BLC, labels_BL)
            items = (labels_BL != IGNORE).sum() if wanted.items is None else wanted.items
            return loss / (items.to(loss.device) if isinstance(items, Tensor) else items), None
        logits_BLV = self.lm_head(hidden_BLC)
        if wanted.reduction == "none":
            losses_BL = functional.cross_entropy(logits_BLV.float().transpose(1, 2), labels_BL, reduction="none")
            return losses_BL, None if wanted.skip_logits else logits_BLV
        given = {"num_items_in_batch": wanted.items, "shift_labels": labels_BL.contiguous()}
        loss = self.loss_function(logits=logits_BLV, labels=wanted.labels, vocab_size=self.config.vocab_size, **given)
        return loss, None if wanted.skip_logits else logits_BLV

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: GenerationMode, *args: Any
    ) -> None:
        """`generate` reads with a `FotCache` of its own where it is given none."""
        wants_cache = generation_config.use_cache is not False
        if self.config.mem_layers and mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError("assisted generation takes tokens back, memory cannot: leave out what assists it")
        if self.config.mem_layers and wants_cache and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation {generation_config.cache_implementation!r}: memory layers read with a "
                    f"FotCache; leave it out"
                )
            model_kwargs["past_key_values"] = FotCache(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, *args)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Without the warning that the text grows past `max_position_embeddings`: with memory it may."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if self.config.mem_layers and isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria


class LongLlamaForCausalLM(FotLlamaForCausalLM):
    """The same model, loaded from and saved in the layout of the released LongLLaMA checkpoints."""

    config_class = LongLlamaConfig
