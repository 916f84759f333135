from pathlib import Path

import pytest

from jobs.config.variants import load_comparison
from pipelines.workflow.errors import UserError


def with_variants(recipe: dict, **variants: dict) -> dict:
    return {**recipe, "variants": variants}


def test_a_recipe_without_variants_is_no_comparison(recipe: dict, write_recipe) -> None:
    assert load_comparison(write_recipe(recipe)) is None
    assert load_comparison(write_recipe({**recipe, "variants": {}})) is None


def test_each_variant_is_the_recipe_with_its_own_values(recipe: dict, write_recipe) -> None:
    standard = {"set": {"finetune.objective": {"kind": "standard", "context": 16}, "finetune.steps": 3}}
    path = write_recipe(with_variants(recipe, fot={}, standard=standard))
    comparison = load_comparison(path, ["seed=7"])
    assert comparison is not None
    made = {name: comparison.recipe(name) for name in comparison.variants}
    assert [recipe.name for recipe in made.values()] == ["tiny-fot", "tiny-standard"]
    assert (made["standard"].finetune.objective.kind, made["standard"].finetune.steps) == ("standard", 3)
    assert (made["fot"].finetune.objective.kind, made["fot"].finetune.steps) == ("fot", 6)
    assert {recipe.seed for recipe in made.values()} == {7}
    assert made["standard"].base == made["fot"].base


def test_a_variant_after_another_starts_from_its_model(recipe: dict, write_recipe, tmp_path: Path) -> None:
    comparison = load_comparison(write_recipe(with_variants(recipe, fot={}, more={"after": "fot"})))
    assert comparison is not None
    made = comparison.recipe("more", tmp_path / "model")
    assert (made.base.checkpoint, made.base.pretrain) == (str(tmp_path / "model"), None)
    assert made.data == comparison.recipe("fot").data


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"after": "b"}, "b": {}}, "variant a: after b: name a variant that stands before it"),
        ({"a": {"after": "a"}}, "variant a: after a: name a variant that stands before it"),
        ({"a": {"sett": {}}}, "unknown key variants.a.sett: did you mean variants.a.set?"),
        ({"a": {"set": {"finetune.stepz": 3}}}, "variant a: unknown key finetune.stepz: did you mean finetune.steps?"),
        ({"a": {"set": {"work_dir": "other"}}}, "variant a: sets work_dir: variants share the recipe's"),
        ({"a": {"set": {"work_dir": "s3://bucket/runs"}}}, "variant a: work_dir s3://bucket/runs is a URL"),
        ({"a b": {}}, "variant a b: name = 'tiny-a b'"),
        (["a"], "variants"),
    ],
)
def test_a_mistake_in_a_variant_is_one_line_that_names_it(recipe: dict, write_recipe, variants, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_comparison(write_recipe({**recipe, "variants": variants}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
