"""The gigatoken library as a faster encoder, for tokenizers of which it makes the very same tokens.

It turns added tokens' strings in a text into these tokens, so texts that hold one are encoded by tokenizers instead.
"""

import re
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from pipelines.tokens.long_text import encode_texts
from pipelines.workflow.errors import UserError


class RefusedError(UserError):
    """gigatoken does not know this kind of tokenizer."""


def make_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[np.ndarray]]:
    """A function that makes token ids (uint32) of texts, in one thread.

    Raises UserError where gigatoken is not installed, RefusedError where it does not know the kind of tokenizer.
    """
    try:
        import gigatoken
    except ImportError:
        raise UserError("tokenizer.backend: gigatoken is not installed: pip install 'fot[gigatoken]'") from None
    try:
        fast = gigatoken.Tokenizer.from_json(tokenizer.to_str())
    except Exception as error:
        raise RefusedError(f"gigatoken cannot load the tokenizer: {str(error).splitlines()[0]}") from error
    added = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
    holds_added_token = re.compile("|".join(added)).search

    def encode(texts: list[str]) -> list[np.ndarray]:
        slow = [number for number, text in enumerate(texts) if holds_added_token(text)]
        found = dict(zip(slow, encode_texts(tokenizer, [texts[number] for number in slow]), strict=True))
        return [found[number] if number in found else fast.encode(text) for number, text in enumerate(texts)]

    return encode
