"""The gate that a model passes to become the champion: every condition must hold, and each says by what numbers."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.config.registry import Condition

Metrics = Mapping[str, Mapping[int, float]]  # name -> {step: value}; the step of an evaluation is tokens of context


@dataclass(frozen=True)
class Decision:
    """`reasons`: a line a condition, with what was measured, beginning with "pass" or "fail"."""

    promote: bool
    reasons: tuple[str, ...]


def decide(conditions: Sequence[Condition], metrics: Metrics) -> Decision:
    """Whether a model with these metrics passes. Without a condition none does."""
    if not conditions:
        return Decision(False, ("fail: the recipe has no registry.promote, so that no model becomes the champion",))
    judged = [_judge(condition, metrics) for condition in conditions]
    return Decision(
        all(held for held, _ in judged), tuple(f"{'pass' if held else 'fail'}: {why}" for held, why in judged)
    )


def passkey_length(metrics: Metrics, least: float = 0.9) -> int | None:
    """The longest length that passkeys are found at, as at all shorter ones, in at least this share of the trials.

    0: not even at the shortest. None where it was not measured.
    """
    measured = metrics.get("passkey/exact")
    if not measured:
        return None
    longest = 0
    for length in sorted(measured):
        if not measured[length] >= least:
            break
        longest = length
    return longest


def metrics_by_name(points: Iterable[tuple[str, float, int, float]]) -> dict[str, dict[int, float]]:
    """Metric points (name, value, step, seconds) as name -> {step: value}."""
    metrics: dict[str, dict[int, float]] = {}
    for name, value, step, _ in points:
        metrics.setdefault(name, {})[step] = value
    return metrics


def _judge(condition: Condition, metrics: Metrics) -> tuple[bool, str]:
    value = _value(condition.metric, condition.at, metrics)
    if isinstance(value, str):
        return False, value
    at = "" if condition.at is None else f" at {condition.at}"
    measured = f"{condition.metric}{at} is {value:.6g}"
    if condition.least is not None:
        return value >= condition.least, f"{measured}, wanted at least {condition.least:.6g}"
    if condition.most is not None:
        return value <= condition.most, f"{measured}, wanted at most {condition.most:.6g}"
    assert condition.of is not None
    assert condition.within is not None, "a condition says one of three things"
    other = _value(condition.of, condition.at, metrics)
    if isinstance(other, str):
        return False, other
    limit = other + condition.within * abs(other)
    wanted = f"wanted at most {limit:.6g}: {condition.of} ({other:.6g}) and {100 * condition.within:.4g} %"
    return value <= limit, f"{measured}, {wanted}"


def _value(name: str, at: int | None, metrics: Metrics) -> float | str:
    """The metric's value at a step, by default the last; or why there is none to judge by."""
    steps = metrics.get(name)
    if not steps:
        near = difflib.get_close_matches(name, metrics, 3, 0.4) or sorted(metrics)[:3]
        return f"{name} was not measured" + (f" (nearest: {', '.join(near)})" if near else ", nor anything else")
    if at is not None and at not in steps:
        return f"{name} was not measured at {at} (but at {', '.join(map(str, sorted(steps)))})"
    value = steps[max(steps) if at is None else at]
    if not math.isfinite(value):
        return f"{name}{'' if at is None else f' at {at}'} is {value}, no finite number"
    return value
