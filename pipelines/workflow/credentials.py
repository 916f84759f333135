"""Credentials in URLs: found, refused, left out of what everybody may read. The one place that knows what they are.

A URL tells them before an @ (a password, a token, a lone name), in its query or in its fragment; one that chains
others (`simplecache::s3://...`) may do so in each of them. Two things are asked. Of a setting, which must go on naming
the same place: what is certain to be secret (`has_credentials`, `without_credentials`). Of what is shown, in errors,
logs and records: whatever might be (`hide_credentials` in any text, `shown_url` of a URL by itself); there rather too
little is left than too much. What is no URL stays as it is, and scrubbing twice is scrubbing once.
"""

import re
from typing import Any
from urllib.parse import unquote

NO_URL = r'\s"<>`'  # never in a URL: it ends before them. In JSON a quote comes after a backslash.

_SCHEME = r"(?<![a-z0-9+.-])[a-z0-9+.-]+://"
_FILE = r"(?:sqlite|file)(?:\+[a-z0-9]+)?:///"  # names of this machine, with whatever in them
_URL = re.compile(rf"(?:[a-z0-9+.-]+::)*(?!{_FILE}){_SCHEME}", re.IGNORECASE)  # what begins with one
_URLS = re.compile(  # those in a text, and urllib3's "with url: /path?query"
    rf"(?:(?!{_FILE}){_SCHEME}|with url: /)(?:[^\\{NO_URL}]|\\[^{NO_URL}])+", re.IGNORECASE
)
_CLOSING = "'.,:;)]}"  # behind a URL they are rather the text's
_CHAIN = re.compile(rf"::(?={_SCHEME})", re.IGNORECASE)
_INNER = re.compile(rf"(?={_SCHEME})", re.IGNORECASE)
_SECRET = re.compile(  # an option, by its name
    r"[?&#;]([^=?&#;/]*(sign|token|secret|passw|pwd|auth|cred|key)[^=?&#;/]*|sig)=", re.IGNORECASE
)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # CONTAINER@ACCOUNT
_BUCKETS = (*_CONTAINERS, "s3", "s3a", "gs", "gcs", "hf", "memory")  # without a port, and with an @ in names


def has_credentials(value: str) -> bool:
    """Whether a setting tells any."""
    return _certain(value) != value


def without_credentials(value: Any) -> Any:
    """JSON whose texts name the same places, without them."""
    if isinstance(value, dict):
        return {name: without_credentials(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_credentials(each) for each in value]
    return _certain(value) if isinstance(value, str) else value


def hide_credentials(text: str) -> str:
    """The text, whose URLs have nothing before an @, no query and no fragment."""

    def shown(found: re.Match[str]) -> str:
        url = found[0].rstrip(_CLOSING)
        return _shown(url) + found[0][len(url) :]

    while (hidden := _URLS.sub(shown, text)) != text:
        text = hidden
    return text


def shown_url(path: str) -> str:
    """The same of a path or URL by itself, which may hold what a URL in a text cannot (blanks, quotes)."""
    if not _URL.match(path):
        return path
    while (hidden := _shown(path)) != path:
        path = hidden
    return path


def is_chained(url: str) -> bool:
    """Whether it is made of several, as fsspec takes them."""
    return _CHAIN.search(url) is not None


def _certain(value: str) -> str:
    """A setting without what is secret for certain: all options of a URL go where the name of one says so."""

    def place(url: str) -> str:
        named = "".join(_without_user(inner, certain=True) for inner in _INNER.split(url))
        return re.split("[?#]", named, maxsplit=1)[0] if _SECRET.search(unquote(named)) else named

    while (rest := place(value) if _URL.match(value) else _URLS.sub(lambda found: place(found[0]), value)) != value:
        value = rest
    return value


def _shown(url: str) -> str:
    """A URL without all that might be secret. Nothing of a chain is left behind the first options."""
    links = []
    for link in _CHAIN.split(url):
        begin = re.search("[?#]" if _is_web(link) else "[?#](?=[^=/]*=)", link)  # else it is a glob's
        place, options = (link[: begin.start()], link[begin.start() :]) if begin else (link, "")
        scheme = place[: len(place) - len(_after_scheme(place))]
        links.append(scheme if "@" in options else _without_user(place, certain=False))  # a password with a ? in it
        if options:
            break
    return "::".join(links)


def _without_user(url: str, certain: bool) -> str:
    """A URL without what stands before an @; not `certain`: nor what might, by a password with a / in it."""
    place = _after_scheme(url)
    scheme = url[: len(url) - len(place)]
    name = scheme.partition("://")[0].lower()
    authority = re.split("[/?#]", place, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    password = ":" in (user if at else authority)
    if at and not password and name.endswith(_CONTAINERS):
        return url
    if certain and not at and re.fullmatch(r"(\[[^\]]*\]|[^:]*):\d*", authority):
        return url  # a port
    anywhere = password or not (certain or name in _BUCKETS)
    return scheme + place[(place if anywhere else authority).rfind("@") + 1 :]


def _after_scheme(url: str) -> str:
    """The URL behind ://; all of a link that has none."""
    found = re.match(r"[a-z0-9+.-]+://|with url: /", url, re.IGNORECASE)
    return url if found is None else url[found.end() :]


def _is_web(url: str) -> bool:
    return re.match(r"[a-z0-9+.-]*https?://|with url: /", url, re.IGNORECASE) is not None
