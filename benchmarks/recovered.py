"""How much of what full attention gains from a longer context a model with memory recovers, by source.

    python -m benchmarks.recovered MEMORY FULL [--near 512] [--far 4096]

MEMORY, FULL: outputs of the stages `perplexity` and `perplexity-full` of one `fot evaluate` or `fot run`, which score
the same windows. Recovered is (own loss at the near context - own loss at the far one) over the same difference of the
base in full attention, in nats; the interval (95 %) is a bootstrap over documents of both together.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jobs.evaluate.losses import DRAWS, Scored, at_steps, read_losses


def gains(scored: list[Scored], source: str, near: int, far: int) -> Mapping[int, float]:
    """By document: nats that its windows lose from the near context to the far one."""
    steps, found = at_steps(scored, "model", source), dict[int, float]()
    for step, sign in ((near, 1), (far, -1)):
        for one in steps[step]:
            found[one.document] = found.get(one.document, 0.0) + sign * one.sums.nats
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("memory", type=Path)
    parser.add_argument("full", type=Path)
    parser.add_argument("--near", type=int, default=512)
    parser.add_argument("--far", type=int, default=4096)
    asked = parser.parse_args()
    memory, full = read_losses(asked.memory), read_losses(asked.full)
    print(f"| source | documents | model, nats at {asked.near} / {asked.far} | base in full attention | recovered |")
    print("|---|---|---|---|---|")
    for source in sorted({one.source for one in memory}):
        own, theirs = (gains(each, source, asked.near, asked.far) for each in (memory, full))
        assert own.keys() == theirs.keys(), "the same windows"
        pairs = np.array([[own[document], theirs[document]] for document in sorted(own)])
        drawn = np.random.default_rng(0).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), DRAWS) @ pairs
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
        share = pairs[:, 0].sum() / pairs[:, 1].sum()
        losses = [
            f"{sum(one.sums.nats for one in windows) / sum(one.sums.tokens for one in windows):.3f}"
            for each in (memory, full)
            for step, windows in at_steps(each, "model", source).items()
            if step in (asked.near, asked.far)
        ]
        print(
            f"| {source} | {len(pairs)} | {losses[0]} / {losses[1]} | {losses[2]} / {losses[3]} "
            f"| {share:.0%} ({low:.0%} to {high:.0%}) |"
        )


if __name__ == "__main__":
    main()
