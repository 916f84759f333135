"""Whether the gigatoken library makes the same tokens as a tokenizer: tried on texts."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.tokens.gigatoken import RefusedError, make_encoder
from pipelines.tokens.tokenizer import PROBES, load_tokenizer


def why_not(directory: Path, texts: Iterable[str]) -> str | None:
    """Why gigatoken cannot encode with the tokenizer in the directory, None if it makes the same tokens of all texts.

    Raises UserError where it is not installed.
    """
    tokenizer = load_tokenizer(directory)
    try:
        encode = make_encoder(tokenizer.tokenizer)
    except RefusedError as refusal:
        return str(refusal)
    for text in (*PROBES, *texts):
        (ours,), (theirs,) = tokenizer.encoder([text]), encode([text])
        if not np.array_equal(ours, theirs):
            return f"gigatoken makes other tokens of the text that begins {text[:30]!r}"
    return None
