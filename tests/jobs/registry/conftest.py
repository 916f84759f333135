"""Outcomes to record."""

from pathlib import Path

import pytest

from jobs.registry.record import Outcome
from jobs.registry.tracking import TrainingFacts

FINISHED = 1_700_000_000.0


@pytest.fixture
def make_outcome(work_dir: Path):
    """An outcome whose files lie in the work directory as a store's do."""

    def make(key: str = "one", passkey: float = 0.95, **changes: object) -> Outcome:
        output = work_dir / "store" / "register" / key
        model, training = work_dir / "store" / "finetune" / key / "model", work_dir / "store" / "finetune" / key
        for directory in (output, model):
            directory.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(f"weights of {key}".encode())
        facts = TrainingFacts(f"finetune-{key}", "tiny", "tiny: finetune", {}, {"steps": 3}, {"seed": 0})
        facts.write(training)
        lines = "".join(f'{{"step": {n}, "loss": {4 - n}, "time": {FINISHED + n - 1}}}\n' for n in (1, 2, 3))
        (training / "metrics.jsonl").write_text(lines)
        (output / "report.html").write_text(f"report of {key}")
        points = {("perplexity/model", 512): 10.05, ("perplexity/base", 512): 10.0, ("perplexity/model", 2048): 9.5}
        points |= {("passkey/exact", 512): 1.0, ("passkey/exact", 2048): passkey}
        values: dict = {
            "key": key,
            "name": "tiny",
            "tags": {"fot.manifest": "abc", "fot.base": "a llama", "fot.tokens_seen": "12"},
            "params": {"seed": 0, "steps": 3},
            "metrics": [(name, value, step, FINISHED) for (name, step), value in points.items()],
            "artifacts": {"report.html": output / "report.html"},
            "model": model,
            "trainings": [training],
        }
        return Outcome(**values | changes)

    return make
