"""The recipe's registry part: where MLflow is, and what a model must have shown to become the champion."""

import os
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_serializer, field_validator, model_validator

from pipelines.config import Part, Positive
from pipelines.workflow.credentials import NO_URL, hide_credentials

SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # with a driver behind a plus: postgresql+psycopg2


def check_tracking_uri(uri: str) -> str:
    """The address of a tracking server or database, as it is. Raises ValueError for anything else."""
    if not uri.startswith("sqlite:") and re.search(f"[{NO_URL}]", uri):
        raise ValueError("it holds a blank, a line break or another character that no URL has: write %20 for a blank")
    shown, scheme = hide_credentials(uri), uri.partition("://")[0].partition("+")[0]
    if scheme not in (*SERVERS, *DATABASES) or "://" not in uri:
        raise ValueError(
            f"{shown} is no tracking server: give http://HOST:PORT, or a database (sqlite:////DIR/mlflow.db, "
            f"postgresql://HOST/NAME); MLflow keeps runs in plain files no longer"
        )
    if scheme == "sqlite":
        if not uri.startswith("sqlite:////"):
            raise ValueError(f"{shown}: give the database's absolute path, as in sqlite:////DIR/mlflow.db")
        return uri
    try:
        host, _ = urlsplit(uri).hostname, urlsplit(uri).port
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"{shown} names no host and port: write it as {scheme}://HOST:PORT")
    return uri


class Condition(Part):
    """What must hold of a metric for a model to become the champion: one of

    {metric: passkey/exact, at: 65536, least: 0.9}
    {metric: perplexity/model, at: 512, most: 12.0}
    {metric: perplexity/model, at: 512, of: perplexity/base, within: 0.01}, which is at most 1 % above the other metric.

    `at`: tokens of context; without it, the metric's value at its last step.
    """

    metric: Annotated[str, Field(min_length=1)]
    at: Positive | None = None
    least: float | None = None
    most: float | None = None
    of: str | None = None
    within: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Condition":
        if (self.of is None) != (self.within is None):
            raise ValueError(f"condition on {self.metric}: `of` (a metric) and `within` (a share) go together")
        if sum(limit is not None for limit in (self.least, self.most, self.within)) != 1:
            raise ValueError(f"condition on {self.metric}: give one of least, most, or of with within")
        return self


class Registry(Part):
    """`tracking_uri`: a tracking server or database; without it what MLFLOW_TRACKING_URI says, else a database in
    work_dir. `promote`: conditions that all must hold for a model to become the champion; without any none does."""

    tracking_uri: str | None = None
    promote: tuple[Condition, ...] = ()

    @field_validator("tracking_uri")
    @classmethod
    def _is_an_address(cls, uri: str | None) -> str | None:
        return None if uri is None else check_tracking_uri(uri)

    @field_serializer("tracking_uri")
    def _without_credentials(self, uri: str | None) -> str | None:
        """Recipes are kept with runs, where others read them."""
        return None if uri is None else hide_credentials(uri)


class RunsPlace(Part):
    """What recipes of every kind say of where their runs are."""

    work_dir: str = "runs"
    registry: Registry = Registry()

    @field_validator("work_dir")
    @classmethod
    def _expand(cls, work_dir: str) -> str:
        return os.path.expanduser(work_dir)
