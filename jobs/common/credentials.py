"""Passwords and signatures in a recipe's values: found, refused, left out of what everybody may read."""

import re
from typing import Any

from pipelines.sources.formats import is_url

SECRET = re.compile(r"[?&]([^=&#]*(sign|token|secret|passw|pwd|auth|key)[^=&#]*|sig)=", re.IGNORECASE)  # in a query
USER_IN_URL = re.compile(r"(?<!abfs)(?<!abfss)://[^/?#\s]*@|://[^/?#\s]*:[^/?#\s]*@")  # abfs://CONTAINER@ACCOUNT
NO_URL = r'\s"<>`'  # never in a URL: it ends before them. In JSON a quote comes after a backslash.
ADDRESS = re.compile(  # of urllib3's "with url: /path?query", too
    rf"\b((?!sqlite|file)[a-z0-9+.-]{{1,30}}://|with url: /)((?:[^\\{NO_URL}]|\\[^{NO_URL}])+)", re.IGNORECASE
)
CLOSING = "'.,:;)]}"  # behind a URL they are rather the text's


def has_credentials(text: str) -> bool:
    """Whether a value shows a password or a signature."""
    return bool(USER_IN_URL.search(text) or (is_url(text) and SECRET.search(text)))


def without_credentials(value: Any) -> Any:
    """JSON whose texts name the same places, without them."""
    if isinstance(value, dict):
        return {name: without_credentials(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_credentials(each) for each in value]
    if not isinstance(value, str) or not has_credentials(value):
        return value
    place = USER_IN_URL.sub("://", value)
    return place.partition("?")[0] if SECRET.search(place) else place


def hide_credentials(text: str) -> str:
    """The text without the names, passwords and queries of URLs in it: rather too little is left than too much."""

    def shown(found: re.Match[str]) -> str:
        url = found[2].rstrip(CLOSING)
        address, _, query = url.partition("?")
        return found[1] + ("" if "@" in query else address.rpartition("@")[2]) + found[2][len(url) :]

    return ADDRESS.sub(shown, text)
