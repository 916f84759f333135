from pathlib import Path

from jobs.measures.result import Point, Result
from jobs.workflow.comparison import compare


def test_models_stand_side_by_side_where_several_have_a_metric(tmp_path: Path) -> None:
    points = {
        "standard": [Point("perplexity/model", 128, 9.0)],
        "fot": [
            Point("perplexity/model", 128, 8.5),
            Point("perplexity/model", 512, 8.0),
            Point("passkey/exact", 128, 1.0),
        ],
    }
    result = compare(points, tmp_path)
    (table,) = result.tables
    assert list(table.columns)[1:] == ["128", "512"]
    assert [list(row) for row in table.rows] == [["standard", 9.0, None], ["fot", 8.5, 8.0]]
    assert Point("perplexity/model/fot", 512, 8.0) in result.points
    (plot,) = result.plots
    assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_r_d_of_every_memory_layer_is_laid_side_by_side(tmp_path: Path) -> None:
    own = [Point("attention_mass/layer2", d, 1 / d) for d in (1, 2)] + [
        Point("attention_mass/layer2_best_head", 1, 1.0)
    ]
    result = compare({"a": own, "b": own}, tmp_path)
    assert [(table.title, table.columns[0]) for table in result.tables] == [("r_d in layer 2", "d")]


def test_variants_are_run_and_laid_side_by_side(fot_here, recipe: dict, write_recipe, tmp_path: Path) -> None:
    again = {"kind": "memorizing", "context": 16, "contexts": 2, "mem_layers": [1], "gate": False}
    recipe["evaluation"] = {"perplexity": {"contexts": [1, 4], "windows": 4, "others": [2]}, "passkey": None}
    recipe["variants"] = {
        "chain": {"set": {"finetune.objective": {"kind": "transformer_xl", "context": 16, "contexts": 2}}},
        "fot": {},
        "more": {"after": "fot", "set": {"finetune.objective": again, "finetune.steps": 2}},
    }
    recipe["variants"]["chain"]["set"]["evaluation.perplexity.others"] = []
    path = write_recipe(recipe)
    waiting = fot_here("status", path).stdout
    assert "more: waits for fot" in waiting
    answer = fot_here("run", path)
    assert answer.returncode == 0, answer.stdout
    store = tmp_path / "runs" / "store"
    made = {stage: len(list((store / stage).glob("*/stage.json"))) for stage in ("shards", "base", "finetune")}
    assert made == {"shards": 1, "base": 2, "finetune": 3}  # the one after fot reads the same tokens
    (compared,) = (store / "comparison").glob("*/result.json")
    table = Result.read(compared.parent).tables[0]
    assert [row[0] for row in table.rows] == ["base", "chain", "fot", "more"]
    assert all(value > 1 for row in table.rows for value in row[1:])
    assert "models:/fot/tiny-fot/1" in answer.stdout
    listed = fot_here("registry", "list").stdout
    assert all(name in listed for name in ("tiny-chain", "tiny-fot", "tiny-more"))
    again = fot_here("run", path)
    assert "done in" not in again.stdout.split("tiny-chain: done")[0]
    assert fot_here("status", path).stdout.count(" done ") >= 20
