"""What an evaluation's key is made of: with another, it is measured anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from jobs.config.evaluation import Evaluation
from jobs.config.train_spec import MODEL
from jobs.evaluate.cells import Cell
from jobs.evaluate.losses import read_losses
from jobs.measures.result import Result
from jobs.workflow import evaluation_stages as stages
from pipelines.sources.file_hashes import FileHashes
from pipelines.workflow.errors import UserError


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


def test_another_number_type_is_measured_anew(tmp_path: Path) -> None:
    for stages_of in (
        lambda **asked: params(tmp_path, passkey={}, **asked),
        lambda **asked: dict(rival_stages(tmp_path, **asked)["perplexity-full"].params),
    ):
        before = stages_of()
        assert "dtype" not in before, "so what was measured before is found"
        assert stages_of(dtype="bfloat16") == {**before, "dtype": "bfloat16"}


def rival_stages(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    asked = {"perplexity": {"contexts": [1, 4], "others": [2]}, "passkey": None, "rivals": ["full"], **settings}
    evaluation = Evaluation.model_validate(asked)
    models, hashes = {"model": "finetune", "base": "base"}, FileHashes(tmp_path / "hashes.json")
    return {stage.name: stage for stage in stages.evaluation_stages(evaluation, models, 32, 0, hashes)}


def test_all_read_the_same_and_stand_side_by_side(
    tmp_path: Path, subject_of, save_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage in this process, without Ray."""

    def run_here(name: str, cells: list[Cell], output: Path) -> dict[str, Any]:
        with torch.inference_mode():
            return {cell.key: json.loads(json.dumps(cell.function(*cell.arguments))) for cell in cells}

    monkeypatch.setattr("jobs.evaluate.tasks.run_cells", run_here)
    base = save_model(num_hidden_layers=2, mem_layers=[], mem_positionals=True, max_position_embeddings=64)
    model = save_model(num_hidden_layers=2, mem_layers=[1], mem_positionals=True, max_position_embeddings=64)
    subject = subject_of({"books": [900, 700], "code": [800]})
    evaluation = Evaluation.model_validate(
        {
            "perplexity": {"contexts": [1, 4, 32], "windows": 5},
            "passkey": {"lengths": [20, 40], "trials": 2, "digits": 2},
            "rivals": ["full", "yarn", "dynamic_ntk", "bm25"],
            "rivals_up_to": 384,
        }
    )
    inputs = {"shards": subject.shards, "index": subject.documents}
    for name, path in {"finetune": model, "base": base}.items():
        inputs[name] = tmp_path / name
        inputs[name].mkdir()
        (inputs[name] / MODEL).symlink_to(path)
    models = {"model": "finetune", "base": "base"}
    for stage in stages.evaluation_stages(evaluation, models, 16, 0, FileHashes(tmp_path / "hashes.json")):
        inputs[stage.name] = tmp_path / stage.name
        inputs[stage.name].mkdir()
        stage.run(inputs[stage.name], {name: inputs[name] for name in stage.inputs})
    result = Result.read(inputs["rivals"])
    values = {(point.metric, point.step): point.value for point in result.points}
    assert values["perplexity/full", 16] == pytest.approx(values["perplexity/bm25", 16])
    assert values["perplexity/full", 64] == pytest.approx(values["perplexity/dynamic_ntk", 64]), "within its length"
    assert {step for metric, step in values if metric == "perplexity/full"} == {16, 64}, "up to rivals_up_to"
    assert {step for metric, step in values if metric == "passkey/exact/yarn"} == {320}
    assert values["nats_less/full", 16] == pytest.approx(0, abs=1e-5), "the same weights"
    own, full, bm25 = (windows(inputs[f"perplexity{end}"]) for end in ("", "-full", "-bm25"))
    assert full == bm25 == [window for window in own if window[-1] <= 384]


def windows(directory: Path) -> list[tuple[Any, ...]]:
    return [one[2:5] for one in read_losses(directory) if one.name == "model"]


def test_rivals_depend_on_the_base_alone(tmp_path: Path) -> None:
    made = rival_stages(tmp_path)
    assert list(made) == ["perplexity", "perplexity-full", "rivals"]
    assert "finetune" not in made["perplexity-full"].inputs
    assert made["rivals"].inputs == ("perplexity", "perplexity-full")
    other = rival_stages(tmp_path, rivals=["full", "yarn"], memory={"top_k": 4})
    assert other["perplexity-full"].params == made["perplexity-full"].params
    assert rival_stages(tmp_path, rivals_up_to=64)["perplexity-full"].params != made["perplexity-full"].params


def test_a_rival_adds_nothing_to_the_keys_of_others(tmp_path: Path) -> None:
    assert rival_stages(tmp_path)["perplexity"].params == rival_stages(tmp_path, rivals=[])["perplexity"].params
    read = rival_stages(tmp_path, reader="full", perplexity={}, rivals=[])["perplexity"]
    assert read.params["reader"] == "full"


def test_a_missing_package_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.evaluate.tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bm25s: pip install 'fot\[bm25\]'"):
        rival_stages(tmp_path, rivals=["bm25"])
    rival_stages(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reader": "full", "attention_mass": {}, "perplexity": {}}, "reader: attention_mass is read with memory"),
        ({"reader": "full"}, "perplexity.others: other documents are read into memory"),
        ({"rivals": ["fall"]}, "rival fall is unknown: did you mean full"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rival_stages(tmp_path, **settings)
