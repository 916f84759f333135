"""What an evaluation's key is made of: with another, it is measured anew."""

from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import stages
from jobs.evaluate.config import Evaluation
from pipelines.hashing import FileHashes


def params(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    evaluation = Evaluation.model_validate({"perplexity": None, "passkey": None, **settings})
    hashes = FileHashes(tmp_path / "hashes.json")
    (stage,) = stages.evaluation_stages(evaluation, {"model": "finetune"}, 32, 0, hashes)
    return dict(stage.params)


def test_another_version_of_the_library_asks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"lm_eval": {"tasks": ["arc_easy"]}}
    monkeypatch.setattr(stages, "version", {"lm_eval": "1"}.get)
    before = params(tmp_path, **asked)
    assert params(tmp_path, **asked) == before
    monkeypatch.setattr(stages, "version", {"lm_eval": "2"}.get)
    assert params(tmp_path, **asked) != before


def test_edited_questions_are_asked_anew(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for file in (train, test):
        file.write_text('{"question": "What ?", "fine": "ENTY:other"}\n')
    asked = {"trec": {"train": str(train), "test": str(test)}}
    before = params(tmp_path, **asked)
    assert params(tmp_path, **asked) == before
    test.write_text('{"question": "Who ?", "fine": "HUM:ind"}\n')
    assert params(tmp_path, **asked) != before
