"""How a checkpoint is written: what kind of thing its name says it is, found out without reading any."""

import re
from pathlib import Path
from typing import Literal

SCHEME = "models:/"  # of a registered model
PACKAGE = "package:"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"

Kind = Literal["registered", "package", "hub", "path"]


def is_model_uri(text: str) -> bool:
    return text.startswith(SCHEME)


def kind_of(checkpoint: str) -> Kind:
    """What could be a hub id or a relative path is the path if it exists here (`./a/b` always is one)."""
    if is_model_uri(checkpoint):
        return "registered"
    if checkpoint.startswith(PACKAGE):
        return "package"
    could_be = re.fullmatch(HUB_ID, checkpoint) and not checkpoint.endswith(".gguf")
    return "hub" if could_be and not Path(checkpoint).exists() else "path"


def is_local(checkpoint: str) -> bool:
    """Whether it is a path, on whatever machine."""
    return kind_of(checkpoint) == "path"
