"""The order in which the files of a tree make one document. Names are relative to the tree, with / between parts."""

import heapq
import posixpath
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby


def random_order(names: Sequence[str], seed: str) -> list[str]:
    """Directory by directory, both the directories and the files in each in random order."""
    parts = sorted(tuple(name.split("/")) for name in names)
    by_directory = sorted(parts, key=lambda path: path[:-1])
    directories = [list(files) for _, files in groupby(by_directory, key=lambda path: path[:-1])]
    shuffled = random.Random(seed)
    shuffled.shuffle(directories)
    for files in directories:
        shuffled.shuffle(files)
    return ["/".join(path) for files in directories for path in files]


def beginning(names: Sequence[str], sizes: Mapping[str, int], limit: int) -> list[str]:
    """The first of the files, of at most `limit` bytes together; one that is larger by itself is passed over."""
    taken, total = [], 0
    for name in names:
        if sizes[name] > limit:
            continue
        total += sizes[name]
        if total > limit:
            break
        taken.append(name)
    return taken


def import_order(names: Sequence[str], theories: Mapping[str, str]) -> list[str]:
    """Isabelle theories after those of the tree that they import, the others after them; else by name.

    `theories`: the beginnings of the .thy files. Where theories import one another in a circle, the first by name of
    those that are left comes next.
    """
    by_theory: dict[str, list[str]] = defaultdict(list)
    for name in sorted(theories):
        by_theory[posixpath.basename(name)].append(name)
    awaited: dict[str, set[str]] = {}
    importers: dict[str, list[str]] = defaultdict(list)
    for name, text in theories.items():
        found = {_resolve(each, name, theories, by_theory) for each in imports(text)} - {None, name}
        awaited[name] = {each for each in found if each is not None}
        for each in awaited[name]:
            importers[each].append(name)
    ordered: dict[str, None] = {}
    ready = [name for name in sorted(theories) if not awaited[name]]
    left = iter(sorted(theories))
    while len(ordered) < len(theories):
        name = heapq.heappop(ready) if ready else next(each for each in left if each not in ordered)
        if name in ordered:
            continue
        ordered[name] = None
        for importer in importers[name]:
            awaited[importer].discard(name)
            if not awaited[importer]:
                heapq.heappush(ready, importer)
    return [*ordered, *sorted(set(names) - theories.keys())]


def imports(theory: str) -> list[str]:
    """What an Isabelle theory imports, as its header says: theory X imports A "B" "../C" Session.D begin."""
    header = re.search(
        r"\btheory\s+\S+\s+imports\s+((?:\"[^\"]*\"|[^\"])*?)\s*\b(?:keywords|abbrevs|begin)\b",
        _without_comments(theory),
    )
    return [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|([^\s"]+)', header[1])] if header else []


def _without_comments(text: str) -> str:
    """The text outside of (* comments *), which may be nested."""
    kept, depth = [], 0
    for piece in re.split(r"(\(\*|\*\))", text):
        if piece == "(*":
            depth += 1
        elif piece == "*)":
            depth = max(0, depth - 1)
        elif depth == 0:
            kept.append(piece)
    return " ".join(kept)


def _resolve(imported: str, name: str, theories: Mapping[str, str], by_theory: Mapping[str, list[str]]) -> str | None:
    """The tree's theory that `imported` in theory `name` means: by its path, else by its name without the session's."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), f"{imported}.thy"))
    if path in theories:
        return path
    file = f"{posixpath.basename(imported).split('.')[-1]}.thy"
    beside = posixpath.join(posixpath.dirname(name), file)
    return beside if beside in theories else next(iter(by_theory.get(file, [])), None)
