"""Passwords and signatures in a recipe's values: found, refused, left out of what everybody may read."""

import re
from typing import Any

from pipelines.storage import is_url

SECRET = re.compile(r"[?&]([^=&#]*(sign|token|secret|passw|pwd|auth|key)[^=&#]*|sig)=", re.IGNORECASE)  # in a query
USER_IN_URL = re.compile(r"(?<!abfs)(?<!abfss)://[^/?#\s]*@|://[^/?#\s]*:[^/?#\s]*@")  # abfs://CONTAINER@ACCOUNT


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
