"""The law of loading: every tensor of a checkpoint has its place in the model, every parameter comes from the
checkpoint, and both have the same shape. What transformers would start at random, leave out or reshape is refused."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

Shape = Sequence[int]

OUTPUT_LAYER, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
PREFIX = "model."
STARTS_HERE = (".mem_gate", ".mem_temperature")  # parameters that a configuration adds to a LLaMA's
COMPUTED = "rotary_emb.inv_freq"  # a buffer that older checkpoints hold; made anew from the configuration
NAMED = 2  # tensors that a message names


def check_shapes(where: object, theirs: Mapping[str, Shape], ours: Mapping[str, Shape], tied: bool) -> None:
    """Raises ValueError where the tensors of a checkpoint (`theirs`) are not a model's (`ours`). `tied`: whether one of
    output layer and embeddings may stand for both."""
    there = {name: shape for name, shape in theirs.items() if COMPUTED not in name}
    missing = ours.keys() - there.keys()
    if tied and len(missing & {OUTPUT_LAYER, EMBEDDINGS}) == 1:
        missing -= {OUTPUT_LAYER, EMBEDDINGS}
    both = sorted(there.keys() & ours.keys())
    others = [(name, there[name], ours[name]) for name in both if tuple(there[name]) != tuple(ours[name])]
    check_loaded(where, missing, there.keys() - ours.keys(), others)


def check_loaded(
    where: object, missing: Collection[str], unexpected: Collection[str], others: Collection[tuple[str, Shape, Shape]]
) -> None:
    """Raises ValueError for parameters that the checkpoint lacks, tensors that the model has no place for, and those of
    another shape (name, in the checkpoint, in the model)."""
    missing = [name for name in missing if not name.endswith(STARTS_HERE)]
    if missing and unexpected:
        raise ValueError(
            f"{where} lacks {_named(missing)}, which the model needs, and holds {_named(unexpected)}, which it has no "
            f"place for: it is not the model that its config.json describes"
        )
    if missing == [OUTPUT_LAYER]:
        raise ValueError(
            f"{where} lacks {OUTPUT_LAYER}: download or convert it again, or say tie_word_embeddings: true in its "
            f"config.json if the embeddings are its output layer"
        )
    if missing:
        raise ValueError(f"{where} lacks {_named(missing)}: download or convert it again")
    if unexpected:
        raise ValueError(
            f"{where} holds {_named(unexpected)}, which the model that its config.json describes has no place for: "
            f"mend the configuration, or remove what is not a LLaMA's"
        )
    if others:
        name, theirs, ours = min(others)
        raise ValueError(
            f"{where} holds {name} of {list(theirs)}, by its config.json it is {list(ours)}: the two are not of one "
            f"model"
        )


def with_prefix(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """The names that the tensors of a model saved without its output layer have in the whole."""
    if any(name.startswith(PREFIX) for name in tensors):
        return dict(tensors)
    return {name if name == OUTPUT_LAYER else PREFIX + name: shape for name, shape in tensors.items()}


def own_output_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an output layer is there that is not the embeddings, whatever a configuration says of ties."""
    layer, embeddings = tensors.get(OUTPUT_LAYER), tensors.get(EMBEDDINGS)
    return layer is not None and (embeddings is None or not torch.equal(layer, embeddings))


def _named(names: Collection[str]) -> str:
    first = sorted(names)
    more = len(first) - NAMED
    return ", ".join(first[:NAMED]) + (f" and {more} more" if more > 0 else "")
