"""The Python packages that are installed in a directory: what each is called, its licence, its files.

Found by their metadata (importlib.metadata); the files are those that a package's RECORD lists.
"""

import csv
import importlib.metadata
import json
import os
import posixpath
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

NOT_STATED = "not stated"
LONGEST_LICENCE = 100  # characters; some put the whole text there


@dataclass(frozen=True)
class Distribution:
    """An installed package. `name`: with its version, such as numpy-2.4.6; `files`: (name relative to site-packages,
    path) of those that no distribution before it has, by name."""

    name: str
    licence: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Found:
    name: str
    version: str
    licence: str
    files: list[tuple[str, str]]

    def order(self) -> tuple[str, ...]:
        return re.sub(r"[-_.]+", "-", self.name).lower(), self.version, self.licence


def site_packages() -> tuple[str, str]:
    """Where the packages of the running Python lie, pure and compiled ones; mostly the same directory."""
    places = sysconfig.get_paths()
    return places["purelib"], places["platlib"]


def find_distributions(directories: Sequence[str]) -> tuple[list[Distribution], dict[str, str]]:
    """Those installed in the directories, by name, and what was left out: why, by name.

    A file of two distributions is the first's; one that is left with none is not among them.
    """
    found, left_out = [], {}
    for directory in {os.path.realpath(each): each for each in directories}.values():
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            if not name.endswith((".dist-info", ".egg-info")):
                continue
            try:
                found.append(_read(directory, name))
            except (OSError, UnicodeDecodeError):
                left_out[name] = "metadata that cannot be read"
            except ValueError as why:
                left_out[name] = str(why)
    distributions, taken = [], set[str]()
    for each in sorted(found, key=_Found.order):
        files = tuple(sorted(file for file in dict(each.files).items() if file[1] not in taken))
        taken.update(path for _, path in files)
        if files:
            distributions.append(Distribution(f"{each.name}-{each.version}", each.licence, files))
    return distributions, dict(sorted(left_out.items()))


def _read(directory: str, place: str) -> _Found:
    """The distribution whose metadata lies in `place`. Raises ValueError or OSError where that, or files, are amiss."""
    installed = importlib.metadata.Distribution.at(os.path.join(directory, place))
    record = installed.read_text("RECORD")
    if record is None or place.startswith("~"):
        raise ValueError("no RECORD" if record is None else "left behind by an uninstallation")
    metadata = HeaderParser().parsestr(installed.read_text("METADATA") or "")
    name, version = metadata.get("Name", ""), metadata.get("Version", "")
    if not (re.fullmatch(r"[A-Za-z0-9._-]+", name) and re.fullmatch(r"[A-Za-z0-9.!+_-]+", version)):
        raise ValueError("no name and version in its METADATA")
    if _is_editable(installed):
        raise ValueError("an editable install")
    return _Found(name, version, _licence(metadata), list(_recorded(record, os.path.abspath(directory))))


def _recorded(record: str, root: str) -> Iterator[tuple[str, str]]:
    """(name, path) of the files of a RECORD that lie in `root`: scripts, say, do not."""
    try:
        rows = [row for row in csv.reader(record.splitlines()) if row]
    except csv.Error:
        raise ValueError("a RECORD that cannot be read") from None
    for row in rows:
        name = posixpath.normpath(row[0].replace("\\", "/"))
        if not name.startswith(("../", "/")) and "\0" not in name:
            yield name, os.path.join(root, *name.split("/"))


def _is_editable(installed: importlib.metadata.Distribution) -> bool:
    """Whether its files lie elsewhere, where somebody works on them."""
    try:
        url = json.loads(installed.read_text("direct_url.json") or "{}")
    except ValueError:
        return False
    information = url.get("dir_info") if isinstance(url, dict) else None
    return isinstance(information, dict) and information.get("editable") is True


def _licence(metadata: Message) -> str:
    """As the metadata says: the expression, else the classifiers, else the first line of what is called licence."""
    if expression := str(metadata.get("License-Expression", "")).strip():
        return _shortened(expression)
    classifiers = [str(each).split(" :: ") for each in metadata.get_all("Classifier", [])]
    names = [parts[-1].strip() for parts in classifiers if parts[0] == "License"]
    if names := [name for name in names if name not in ("License", "OSI Approved")]:
        return _shortened(", ".join(names))
    lines = str(metadata.get("License", "")).strip().splitlines()
    return _shortened(lines[0].strip()) if lines else NOT_STATED


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_LICENCE else f"{text[:LONGEST_LICENCE]}..."
