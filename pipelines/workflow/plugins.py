"""What users add without a fork: entry points of installed distributions, by group and name (docs/plugins.md).

The names are looked up once a process; a plugin's code is imported when it is used.
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipelines.workflow.errors import UserError


@dataclass(frozen=True)
class Plugin:
    """An entry point, and the distribution and version that it comes with."""

    point: EntryPoint
    distribution: str
    version: str

    @property
    def made_by(self) -> str:
        """What decides how it behaves: its distribution and version."""
        return f"{self.distribution} {self.version}"

    def load(self) -> Any:
        """The object. Raises UserError where its code cannot be imported or has no such object."""
        try:
            return self.point.load()
        except Exception as error:  # of code that is not ours, anything
            raise self.mistake(f"cannot be loaded ({said(error)})") from error

    def mistake(self, what: str) -> UserError:
        """What is wrong with it, for whoever installed it."""
        return UserError(f"{self.point.group} {self.point.name} of {self.made_by} {what}: mend it or uninstall it")


@cache
def find_plugins(group: str, taken: Set[str] = frozenset()) -> dict[str, Plugin]:
    """The plugins of a group by name, in the order of the names. `taken`: names that are ours.

    Raises UserError for a name that is ours, that two distributions give, or that is not of small letters, digits and
    underscores.
    """
    found: dict[str, Plugin] = {}
    plugins = [Plugin(point, point.dist.name, point.dist.version) for point in entry_points(group=group) if point.dist]
    for plugin in sorted(plugins, key=lambda plugin: (plugin.point.name, plugin.distribution)):
        point = plugin.point
        if not re.fullmatch(r"[a-z0-9_]+", point.name):
            raise plugin.mistake("has a name that is not of small letters, digits and _")
        if point.name in taken:
            raise plugin.mistake("has a name that fot itself uses")
        if (other := found.get(point.name)) is not None:
            raise plugin.mistake(f"has the name of one of {other.made_by}")
        found[point.name] = plugin
    return found


def said(error: Exception) -> str:
    """An error of code that is not ours, in a line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
