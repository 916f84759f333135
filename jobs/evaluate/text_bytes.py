"""How many bytes of text (UTF-8) each token stands for: models with different tokenizers compare in bits a byte.

Counted token by token from the vocabulary, so it adds up: the bytes of consecutive windows are those of the whole, and
where an edge lies inside a character, each side has the bytes that its tokens spell.

- Byte-level BPE writes every byte as a character of its own alphabet: a token has as many bytes as characters.
- SentencePiece writes a space as "▁", and bytes of characters that it does not know as <0x0A>. The space that it puts
  before a text is none of the text's.
- Special tokens (bos, eos, unknown) stand for no text. What a tokenizer changes (normal forms, lower case) is counted
  as changed.
"""

import json
import re

import numpy as np

from pipelines.tokens.tokenizer import TextTokenizer

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: TextTokenizer) -> np.ndarray:
    """Bytes of text by token id: int64 [vocabulary]."""
    library = tokenizer.tokenizer
    byte_level = '"ByteLevel"' in json.dumps(json.loads(library.to_str())["decoder"])
    added = library.get_added_tokens_decoder()
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    for piece, number in library.get_vocab().items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(piece.encode())
        elif byte_level:
            sizes[number] = len(piece)
        else:
            sizes[number] = 1 if BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
    return sizes


def prefix_bytes(tokenizer: TextTokenizer) -> int:
    """Bytes of the space that the tokenizer puts before every text: 1 or 0."""
    first = tokenizer.tokenizer.id_to_token(tokenizer.encode("a")[0])
    return 1 if first is not None and first.startswith((SPACE, "Ġ")) else 0
