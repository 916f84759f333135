"""How far a job is, read from what it prints: the lines of `fot run` where no terminal shows bars."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = re.compile(r"(?P<title>\S+): \d+ stages; library output goes to")
DONE = re.compile(r" *(?P<stage>\S+) (?P<how>found|done in \d+:\d\d) (?P<where>\S.*)")
AT = re.compile(r" *(?P<what>[a-z][\w -]*?) (?P<done>[\d.]+[kMG]?)/(?P<total>[\d.]+[kMG]?) (?P<rest>\S+, .*)")
MADE = re.compile(
    r"  (?P<what>model \(Hugging Face directory\)|report|MLflow run|registered model) {2,}(?P<which>\S.*)"
)


@dataclass(frozen=True)
class StageRow:
    """`of`: the recipe, or a variant of it. `state`: found, done or running; `detail`: how far, or where it lies."""

    of: str
    stage: str
    state: str
    detail: str


def read_progress(log: str) -> list[StageRow]:
    """The stages that were begun, in order; the last may be running."""
    rows: list[StageRow] = []
    title, running = "", None
    for line in log.splitlines():
        if header := HEADER.match(line):
            title = header["title"]
        elif done := DONE.fullmatch(line):
            rows.append(StageRow(title, done["stage"], done["how"], done["where"]))
            running = None
        elif at := AT.fullmatch(line):
            running = StageRow(title, at["what"], "running", f"{at['done']}/{at['total']} {at['rest']}")
    return [*rows, running] if running is not None else rows


def read_made(log: str) -> Iterator[tuple[str, str]]:
    """(what, which) of what a job says at its end that it made."""
    for line in log.splitlines():
        if made := MADE.fullmatch(line):
            yield made["what"], made["which"].strip()
