"""Losses and gradients that are no numbers, or spikes: found, and the steps that are left out because of them."""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from jobs.config.training import BadLoss
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically

WINDOW = 100  # losses that a spike is measured against
LEAST = 10  # of them, before anything is a spike
SKIPPED = "skipped.json"
REMEDY = "lower optimizer.learning_rate or lengthen schedule.warmup_steps; bad_loss.action=skip leaves such steps out"


class BadLossError(UserError):
    """The loss of `step` (from 0) is a spike, or it or its gradient is no number; `what` says so."""

    def __init__(self, step: int, what: str, remedy: str) -> None:
        super().__init__(f"step {step + 1}: {what}: {remedy}")
        self.step, self.what, self.remedy = step, what, remedy

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return type(self), (self.step, self.what, self.remedy)


class LossWatch:
    """`recent`: the losses before, as a checkpoint keeps them, so that a resumed training judges alike."""

    def __init__(self, settings: BadLoss, recent: Sequence[float]) -> None:
        self._spike = settings.spike
        self._recent = deque(recent, maxlen=WINDOW)

    def check(self, step: int, loss: float, norm: float | None) -> None:
        """Look at a step's loss and the norm of its gradient (None if unknown). Raises BadLossError."""
        if not math.isfinite(loss):
            raise BadLossError(step, f"its loss is {loss}", REMEDY)
        if norm is not None and not math.isfinite(norm):
            raise BadLossError(step, f"the norm of its gradient is {norm}", REMEDY)
        if self._spike is not None and len(self._recent) >= LEAST:
            usual = median(self._recent)
            if loss > self._spike * usual:
                what = f"its loss is {loss:.3f}, over {self._spike:g} times the median {usual:.3f} before it"
                raise BadLossError(step, what, REMEDY)
        self._recent.append(loss)

    @property
    def recent(self) -> list[float]:
        return list(self._recent)


class SkippedSteps:
    """The steps left out, in a file that outlives the process."""

    def __init__(self, directory: Path, settings: BadLoss) -> None:
        self._path, self._settings = directory / SKIPPED, settings
        content = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.reasons: dict[int, str] = {int(step): what for step, what in content.items()}

    def add(self, error: BadLossError, write: bool) -> None:
        """Leave the error's step out from now on; one rank writes it down. Raises the error where the recipe says stop,
        or enough were left out."""
        if self._settings.action == "stop":
            raise error
        if len(self.reasons) >= self._settings.most:
            remedy = f"{len(self.reasons)} steps are left out already, as many as bad_loss.most allows: lower the rate"
            raise BadLossError(error.step, error.what, remedy) from error
        self.reasons[error.step] = error.what
        if write:
            self._write()

    def remember(self, reasons: Mapping[str, str], write: bool) -> None:
        """Add what a checkpoint says was left out before it; one rank writes it down."""
        self.reasons |= {int(step): what for step, what in reasons.items()}
        if reasons and write:
            self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self.reasons, indent=1).encode())

    def __contains__(self, step: int) -> bool:
        return step in self.reasons

    def before(self, step: int) -> int:
        """How many of the steps before were left out."""
        return sum(other < step for other in self.reasons)

    def __len__(self) -> int:
        return len(self.reasons)
