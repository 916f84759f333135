"""The trials of a passkey measurement: kept in a file, and the interval of a share of them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.workflow.files import write_atomically

TRIALS = "trials.json"
Z = 1.96  # of a 95 % interval
Trial = Mapping[str, float]  # "depth", and what it scored


def write_trials(trials: Mapping[int, Sequence[Trial]], directory: Path) -> None:
    """By tokens of the prompt."""
    write_atomically(directory / TRIALS, json.dumps(trials).encode())


def read_trials(directory: Path) -> dict[int, list[Trial]]:
    return {int(tokens): own for tokens, own in json.loads((directory / TRIALS).read_text()).items()}


def share(trials: Sequence[Trial], score: str) -> float:
    """Of the trials that have this score."""
    return sum(bool(trial[score]) for trial in trials) / len(trials)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = successes / trials, Z * Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / trials / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(trials: Sequence[Trial], score: str) -> str:
    """Wilson's, as text."""
    low, high = wilson(sum(bool(trial[score]) for trial in trials), len(trials))
    return f"{low:.3f} to {high:.3f}"
