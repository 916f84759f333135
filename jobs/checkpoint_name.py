"""How a checkpoint is written: what kind of thing its name is, without looking for more than a path."""

import re
from pathlib import Path
from typing import Literal

from jobs.registry.models import is_model_uri
from pipelines.errors import UserError

PACKAGE = "package:"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"

Kind = Literal["registered", "package", "hub", "path"]


def kind_of(checkpoint: str) -> Kind:
    """What could be a hub id or a relative path is the path if it exists here (`./a/b` always is one)."""
    if is_model_uri(checkpoint):
        return "registered"
    if checkpoint.startswith(PACKAGE):
        return "package"
    could_be = re.fullmatch(HUB_ID, checkpoint) and not checkpoint.endswith(".gguf")
    return "hub" if could_be and not Path(checkpoint).exists() else "path"


def check_revision(checkpoint: str | None, revision: str | None) -> None:
    """Raises UserError for a revision of anything but a hub id."""
    if revision is not None and (checkpoint is None or kind_of(checkpoint) != "hub"):
        named = "base.pretrain" if checkpoint is None else checkpoint
        raise UserError(f"base.revision belongs to a hub id (ORGANIZATION/NAME), which {named} is not: leave it out")
