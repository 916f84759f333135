"""Registered models by address: models:/fot/NAME@ALIAS or models:/fot/NAME/VERSION, fetched once.

MLflow refuses the slash in a name, so `fot/NAME` is registered as `fot.NAME`; both ways to write it are understood.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.config.checkpoint_name import SCHEME
from pipelines.workflow.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class ModelAddress:
    """A model's registered name, and an alias or a version of it; with neither it is the newest version."""

    name: str
    alias: str | None = None
    version: str | None = None

    @property
    def shown(self) -> str:
        return SCHEME + self.name.replace(".", "/", 1)


def model_address(text: str) -> ModelAddress:
    """Reads models:/fot/NAME@ALIAS, models:/fot.NAME/3, NAME@ALIAS and so on. Raises UserError for what is none."""
    found = re.fullmatch(r"(?:models:/)?(?:fot[./])?([A-Za-z0-9_.-]+?)(?:@([A-Za-z0-9_.-]+)|/([0-9]+))?", text.strip())
    if found is None:
        raise UserError(f"{text} is no model: write models:/fot/NAME@champion, or models:/fot/NAME/3 for version 3")
    return ModelAddress(f"fot.{found[1]}", found[2], found[3])


def find_version(client: "MlflowClient", address: ModelAddress) -> "ModelVersion":
    """The version that the address names. Raises UserError, which says what there is instead."""
    versions = {str(found.version): found for found in client.search_model_versions(f"name = '{address.name}'")}
    if not versions:
        names = [model.name.replace(".", "/", 1) for model in registered_models(client)]
        raise UserError(f"{address.shown}: there is no such model, but {', '.join(names) or 'none at all'}")
    aliases = client.get_registered_model(address.name).aliases
    there = f"versions {', '.join(sorted(versions, key=int))}"
    there += "".join(f", {alias} = {version}" for alias, version in sorted(aliases.items()))
    if address.alias is not None and address.alias not in aliases:
        raise UserError(f"{address.shown} has no alias {address.alias}: there are {there}")
    wanted = aliases[address.alias] if address.alias is not None else address.version or max(versions, key=int)
    if str(wanted) not in versions:
        raise UserError(f"{address.shown} has no version {wanted}: there are {there}")
    return versions[str(wanted)]


def registered_models(client: "MlflowClient") -> Iterator["RegisteredModel"]:
    """All of them, however many pages that takes."""
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def fetch_model(uri: str, tracking_uri: str, into: Path) -> Path:
    """The Hugging Face directory of a registered version, in `into`, where it is fetched to once.

    Raises UserError for a model, alias or version that there is not, while MLflow is down, and for weights that are no
    safetensors.
    """
    from mlflow.artifacts import download_artifacts

    from jobs.registry.record import check_safetensors
    from jobs.registry.server import connect, files_in, locked, talking_to

    address = model_address(uri)
    if address.alias is None and address.version is None:
        raise UserError(f"{uri} does not say which version: write {address.shown}@champion, or {address.shown}/1")
    with talking_to(tracking_uri):
        client = connect(tracking_uri)
        found = find_version(client, address)
        source = client.get_model_version_download_uri(found.name, found.version)
    path = into / f"{found.name}-{found.version}-{found.run_id[:8]}"  # of a new database it is another model
    with locked(into / f".{path.name}.lock"):
        if path.exists():
            return path
        temporary = into / f".{path.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        temporary.mkdir()
        try:
            with talking_to(tracking_uri), files_in(source):
                fetched = Path(download_artifacts(source, dst_path=str(temporary), tracking_uri=tracking_uri))
            check_safetensors(fetched)
            os.rename(fetched, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path
