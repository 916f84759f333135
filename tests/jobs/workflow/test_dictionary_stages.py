"""The dictionary recipe through the command line, and its model asked by `fot evaluate`."""

from pathlib import Path

import yaml

from jobs.measures.result import Result


def write(path: Path, **changes: object) -> Path:
    recipe = {
        "kind": "dictionary",
        "name": "lookup",
        "seeds": [0, 1],
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1},
        "training": {"phases": [{"steps": 3, "records": 3, "documents": 4}]},
        "evaluation": {"tokens": [256, 1024], "windows": 1, "top_k": 4},
    }
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def test_every_seed_is_trained_and_asked_and_the_model_asked_again(fot_here, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    answer = fot_here("run", path)
    assert answer.returncode == 0, answer.stdout
    store = tmp_path / "runs" / "store"
    (found,) = (store / "dictionary").glob("*/result.json")
    result = Result.read(found.parent)
    assert {(point.metric, point.step) for point in result.points} == {
        *((f"dictionary/{way}", tokens) for way in ("dense", "top_k") for tokens in (256, 1024)),
        *(("dictionary/cpu_minutes", seed) for seed in (0, 1)),
    }
    assert [len(row) for row in result.tables[0].rows] == [5] * 4
    assert (found.parent / result.plots[0]).read_bytes().startswith(b"\x89PNG")
    assert "dictionary found" in fot_here("run", path).stdout
    assert fot_here("status", path).stdout.count(" done ") == 6

    (model,) = (store / "train-0").glob("*/model")
    sets = ("--set", "dictionary={tokens: [256], windows: 1, top_k: null}")
    asked = fot_here("evaluate", model, "--task", "dictionary", *sets)
    assert asked.returncode == 0, asked.stdout
    assert "Accuracy on value tokens" in asked.stdout


def test_a_mistake_is_one_line(fot_here, tmp_path: Path) -> None:
    for changes, message in (
        ({"seedz": [1]}, "unknown key seedz: did you mean seeds?"),
        ({"evaluation": {"tokens": [100]}}, "100 tokens are no whole contexts"),
        ({"evaluation": {"tokens": [16777216], "max_gigabytes": 0.001}}, "tokens fit"),
    ):
        answer = fot_here("run", write(tmp_path / "recipe.yaml", **changes))
        assert answer.returncode == 2
        assert message in answer.stdout.splitlines()[-1]
    planned = fot_here("plan", write(tmp_path / "recipe.yaml"))
    assert planned.returncode == 2
    assert "only `fot run`, `fot status` and `fot submit` take it" in planned.stdout
