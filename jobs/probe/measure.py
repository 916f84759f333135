"""Reading one prompt in full attention: which heads see what is to be copied, and what each layer's far attention is
worth. Runs where the model is.

Shapes: L tokens, Q queries, H heads, N layers, C hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fot_model import FotLlamaForCausalLM, key_mass
from fot_model.ablation import near_mask, one_changed
from jobs.models.base import load_llama
from jobs.probe.prompts import Prompt

_loaded: dict[Path, FotLlamaForCausalLM] = {}  # of this worker, one at most


def read_prompt(path: Path, prompt: Prompt) -> dict[str, Any]:
    """{"copy", "line"}: mean mass over the queries by layer and head [N][H], on the token to be copied and on its line;
    "loss": of the answers' tokens, in nats."""
    model = _load(path)
    ids_1L = torch.tensor([prompt.ids], device=model.device)
    at_Q = torch.tensor([query.at for query in prompt.queries])
    keys_2QL = torch.zeros(2, len(prompt.queries), len(prompt.ids), dtype=torch.bool)
    for number, query in enumerate(prompt.queries):
        keys_2QL[0, number, query.copy] = True
        keys_2QL[1, number, query.line[0] : query.line[1]] = True
    with torch.inference_mode(), key_mass(model, at_Q, keys_2QL) as found:
        hidden_1LC = model.model(ids_1L, use_cache=False).last_hidden_state
        loss = _loss(model, ids_1L, hidden_1LC, at_Q)
    mass_NSH = [found[layer].mean(-1).tolist() for layer in sorted(found)]
    return {"copy": [mass[0] for mass in mass_NSH], "line": [mass[1] for mass in mass_NSH], "loss": loss}


def change_layers(path: Path, prompt: Prompt, local: int) -> dict[str, list[float]]:
    """Loss of the answers' tokens in nats, by layer [N] and at last with none changed: "without" this layer's attention
    beyond `local` tokens, all others having theirs; and with this layer's "alone"."""
    model = _load(path)
    ids_1L, at_Q = torch.tensor([prompt.ids], device=model.device), torch.tensor([q.at for q in prompt.queries])
    near_11LL = near_mask(len(prompt.ids), local, model.model.embed_tokens.weight)
    masks = {"without": (None, near_11LL), "alone": (near_11LL, None)}
    with torch.inference_mode():
        return {
            name: [_loss(model, ids_1L, hidden, at_Q) for hidden in one_changed(model, ids_1L, usual, changed)]
            for name, (usual, changed) in masks.items()
        }


def _loss(model: FotLlamaForCausalLM, ids_1L: Tensor, hidden_1LC: Tensor, at_Q: Tensor) -> float:
    """Mean negative log-likelihood of the tokens after these positions: logits [Q, V] of them alone."""
    at_Q = at_Q.to(ids_1L.device)
    logits_QV = model.lm_head(hidden_1LC[0, at_Q]).float()
    return float(functional.cross_entropy(logits_QV, ids_1L[0, at_Q + 1]))


def _load(path: Path) -> FotLlamaForCausalLM:
    """The model, with what memory layers it may have as a part of full attention: nothing goes to a memory."""
    if path not in _loaded:
        _loaded.clear()
        model = load_llama(path, dtype="auto")
        _loaded[path] = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return _loaded[path]
