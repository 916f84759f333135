"""Names and ids come from outside: what they hold must not change what a terminal shows, or does."""

import re

# Control characters, line ends, what turns the direction of writing around, and halves of surrogate pairs.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text on one line, with escapes for what would not be seen as it is."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
