"""What a job needs, against what a cluster has."""

from pathlib import Path

import pytest

from jobs.cluster.needs import check_fits, counted, fitting, needs_view, planned
from jobs.cluster.nodes import Cluster
from jobs.cluster.package import load_all
from jobs.config.recipe import load_recipe
from pipelines.workflow.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 1e9}


def cluster(*nodes: dict[str, float], grows: bool | None = False) -> Cluster:
    return Cluster("python", nodes, {"CPU": 1.0, "GPU": 0.0}, grows)


def test_a_worker_fits_a_node_with_all_that_it_asks_for() -> None:
    nodes = cluster(GPU_NODE, {"CPU": 64.0}, {"CPU": 3.0, "GPU": 8.0})
    assert fitting({"CPU": 1.0, "GPU": 1.0}, nodes) == 4 + 0 + 3
    assert fitting({"CPU": 16.0}, nodes) == 4


def test_what_never_fits_is_refused_unless_the_cluster_grows() -> None:
    recipe = load_all(RECIPES / "longllama_3b.yaml")  # 8 GPUs or more
    with pytest.raises(UserError, match=r"room for 4 and does not grow: lower resources.workers .*workers=4\) or use"):
        check_fits(recipe, cluster(GPU_NODE))
    with pytest.raises(UserError, match=r"room for 0 and does not grow: use a larger cluster$"):
        check_fits(recipe, cluster({"CPU": 8.0}))
    assert "room for 4, the autoscaler must add nodes" in str(check_fits(recipe, cluster(GPU_NODE, grows=True)))
    unsure = cluster(GPU_NODE, grows=None)
    assert "room for 4, nodes must come: whether any do is not known" in str(check_fits(recipe, unsure))
    assert dict(needs_view(recipe, unsure))["cluster"].endswith("free now 1 CPU; whether it grows is not known")
    assert check_fits(recipe, cluster(*[GPU_NODE] * 8)) is None


def test_a_dictionary_has_no_training_workers_and_fits_anywhere() -> None:
    recipe = load_all(RECIPES / "dictionary.yaml")
    assert check_fits(recipe, cluster({"CPU": 1.0})) is None
    assert [what for what, _ in needs_view(recipe, cluster({"CPU": 1.0}))] == ["needs", "cluster"]


def test_a_need_is_told_in_words_with_the_plan_of_each_training() -> None:
    recipes = load_all(RECIPES / "quickstart.yaml")
    told = dict(needs_view(recipes, cluster(GPU_NODE, GPU_NODE)))
    assert told["training"].startswith("2 x (1 CPU): 2 CPUs;")
    assert told["cluster"] == "2 nodes, 16 CPUs and 8 GPUs, free now 1 CPU"
    steps = load_recipe(RECIPES / "quickstart.yaml").finetune.steps
    assert f" tokens in {steps:,} steps, " in told["finetune"]
    assert "GB a worker" in told["base"]


def test_what_variants_need_is_told_of_each_and_the_largest_decides(recipe, write_recipe) -> None:
    wide = {
        "resources.workers": 16,
        "finetune.batch.micro_batches": 16,
        "base.pretrain.training.batch.micro_batches": 16,
    }
    variants = {"plain": {}, "then": {"after": "plain", "set": {"finetune.steps": 99}}, "wide": {"set": wide}}
    recipes = load_all(write_recipe({**recipe, "variants": variants}))
    assert list(recipes) == ["plain", "then", "wide"]
    told = list(needs_view(recipes, cluster(GPU_NODE)))
    assert [what for what, _ in told] == ["training", "training", "base", "base", "finetune", "finetune", "cluster"]
    assert [words.rpartition(" (")[2] for _, words in told[:4]] == ["plain, then)", "wide)", "plain)", "wide)"]
    assert told[1][1].startswith("16 x (1 CPU): 16 CPUs;")
    with pytest.raises(
        UserError, match=r"^variant wide: resources: 16 workers .* never fit .*lower resources.workers or"
    ):
        check_fits(recipes, cluster(GPU_NODE))
    assert str(check_fits(recipes, cluster({"CPU": 1.0}, grows=True))).startswith("16 workers with 1 CPU each")


def test_a_base_whose_shape_nothing_tells_here_has_no_plan() -> None:
    changes = ["base.checkpoint=/on/the/cluster", "data.sources.0.path=x"]
    assert list(planned(load_recipe(RECIPES / "finetune.yaml", changes))) == []


def test_counts_are_words() -> None:
    assert counted({"CPU": 1.0, "GPU": 0.0}) == "1 CPU"
    assert counted({"CPU": 2.0, "GPU": 1.0}) == "2 CPUs and 1 GPU"
    assert counted({}) == "nothing"
