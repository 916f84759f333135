import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs.config.recipe import load_recipe
from pipelines.workflow.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"


def test_the_finetune_recipe_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"--set data\.sources\.0\.path=VALUE"):
        load_recipe(RECIPES / "finetune.yaml")
    with pytest.raises(UserError, match=r"--set base\.checkpoint=DIR"):
        load_recipe(RECIPES / "finetune.yaml", ["data.sources.0.path=/text"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.stepz=3", "unknown key finetune.stepz: did you mean finetune.steps?"),
        ("finetune.objective.mem_layer=[1]", "did you mean finetune.objective.mem_layers?"),
        ("data.sources.0.paht=x", "unknown key data.sources.0.paht: did you mean data.sources.0.path?"),
        ("base.pretrain.shape.hiden_size=8", "did you mean base.pretrain.shape.hidden_size?"),
        ("evaluations.x=1", "unknown key evaluations: did you mean evaluation?"),
        ("zzzz=1", "unknown key zzzz: remove it"),
        ("finetune.steps=many", "finetune.steps = 'many'"),
        ("finetune.steps=0", "finetune.steps = 0: input should be greater than 0"),
        ("finetune.objective.kind=fto", "finetune.objective"),
        ("finetune.objective.segments=[[1,0],[1,1]]", "segment 0 asks for 1 positives"),
        ("base.checkpoint=/model", "either a Hugging Face LLaMA directory"),
        (
            "base={checkpoint: /model, revision: main}",
            "base.revision belongs to a hub id (ORGANIZATION/NAME), which /m",
        ),
        ("base={checkpoint: 'package:a/b', revision: main}", "which package:a/b is not: leave it out"),
        ("base={checkpoint: a/b.gguf, revision: main}", "which a/b.gguf is not: leave it out"),
        ("base.revision=main", "which base.pretrain is not: leave it out"),
        ("finetune.objective.mem_layers=[5]", "mem_layers [5]: the base has 2 layers, 0 to 1"),
        ("finetune.objective.mem_layers=[]", "finetune.objective.mem_layers"),
        ("finetune.objective.context=32", "is longer than the base is pre-trained with (16)"),
        ("base.pretrain.training.objective.kind=fot", "kind must be standard"),
        ("evaluation.passkey.digits=1", "evaluation.passkey.digits = 1"),
        ("fot.steps=5", "unknown key fot"),
        (
            "resources.workers=3",
            "base.pretrain.training.batch.micro_batches (2) is not a multiple of resources.workers (3)",
        ),
        ("base.pretrain.shape.num_attention_heads=5", "hidden_size must be a multiple of 2 x num_attention_heads"),
        ("data.sources.7.path=x", "data.sources is a list of 1"),
        ("name.x=1", "name = {'x': 1}: input should be a valid string"),
        ("finetune.objective.segments.0.0.x=1", "finetune.objective.segments.0.0 is a value and has no keys"),
        ("finetune.steps", "write it as key=value"),
        (
            "registry.promote=[{metric: passkey/exact, at: 999, least: 1}]",
            "passkey/exact is measured at 320 tokens, not at",
        ),
        (
            "registry.promote=[{metric: trec/accuracy, least: 1}]",
            "trec/accuracy is not measured: evaluation.trec is not",
        ),
        ("registry.promote=[{metric: passkey/exact}]", "passkey/exact: give one of least, most"),
        ("registry.tracking_uri=ftp://host", "no tracking server"),
        ("work_dir=s3://bucket/runs", "work_dir s3://bucket/runs is a URL: give a directory"),
        ("evaluation.perplexity.mode=whole", "evaluation.perplexity.mode = 'whole'"),
        ("finetune.steps=yes", "finetune.steps = 'yes': input should be a valid integer"),
        ("finetune.steps=true", "finetune.steps is true or false: give a number"),
        ("finetune.objective.segments=[[0, 0], [true, 0]]", "finetune.objective.segments.1.0 is true or false"),
        ("data.sources.0.held_out=false", "data.sources.0.held_out is true or false: give a number"),
        ("finetune.steps=1e3", "finetune.steps = '1e3': input should be a valid integer"),
        ("finetune.steps=1:30", "finetune.steps = '1:30': input should be a valid integer"),
        ("finetune.steps=2.5", "finetune.steps = 2.5: input should be a valid integer"),
        ("finetune.optimizer.learning_rate=.inf", "learning_rate = inf: input should be a finite number"),
        ("finetune.optimizer.learning_rate=.nan", "learning_rate = nan: input should be a finite number"),
        ("data.sources.0.suffixes=[.py #, .md]", "its # would begin a comment"),
        ("finetune.batch={groups: 1, groups: 2}", "groups stands twice"),
        (
            "data.sources=[{name: a, path: a, weight: 1}, {name: b, path: b, weight: 0.0001}]",
            "data.sources: the weight of 'b' (0.0001) is less than 0.001 of all: raise it or leave the source out",
        ),
        ("name=1.10", "name = 1.1: input should be a valid string"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(recipe: dict, write_recipe, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(recipe), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_change_keys_add_list_items_and_take_yaml_values(recipe: dict, write_recipe) -> None:
    made = load_recipe(
        write_recipe(recipe),
        [
            "finetune.steps=9",
            "finetune.optimizer.learning_rate=2.0e-4",
            "data.sources.1.name=more",
            "data.sources.1.path=/x=y",
            "finetune.objective.segments=[[0, 0], [1, 2]]",
        ],
    )
    assert made.finetune.steps == 9
    assert made.finetune.optimizer.learning_rate == 2e-4
    assert made.data.sources[1].path == "/x=y"
    assert made.finetune.objective.segments == ((0, 0), (1, 2))


def test_numbers_and_texts_are_read_as_they_are_meant(recipe: dict, write_recipe) -> None:
    asked = ["finetune.steps=010", "seed=1_000", "name=2024-01-01", "data.sources.0.path=/a #b"]
    made = load_recipe(write_recipe(recipe), [*asked, "finetune.optimizer.learning_rate=1e-4"])
    assert (made.finetune.steps, made.seed, made.name, made.data.sources[0].path) == (10, 1000, "2024-01-01", "/a #b")
    assert made.finetune.optimizer.learning_rate == 1e-4


def test_a_key_twice_in_a_recipe_is_refused_by_name_and_line(recipe: dict, write_recipe) -> None:
    path = write_recipe(recipe)
    lines = path.read_text().splitlines()
    lines.insert(1, lines[0])
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    name = lines[0].partition(":")[0]
    assert str(error.value) == f"recipe {path}: {name} stands twice, in lines 1 and 2: remove one"


def test_a_recipe_that_is_missing_or_broken_is_one_line(tmp_path: Path) -> None:
    for content in (None, "a: [1", "- 1\n", ""):
        path = tmp_path / "recipe.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError) as error:
            load_recipe(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_cannot_be_changed_once_read(recipe: dict, write_recipe) -> None:
    made = load_recipe(write_recipe(recipe))
    with pytest.raises(ValidationError):
        made.seed = 3


def test_what_is_written_reads_back_the_same(recipe: dict, write_recipe) -> None:
    made = load_recipe(write_recipe(recipe))
    again = write_recipe(yaml.safe_load(yaml.safe_dump(made.model_dump(mode="json"))))
    assert load_recipe(again) == made


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("attention_mass={}", "evaluation.attention_mass: with finetune.objective.kind transformer_xl"),
        ("perplexity={others: [2]}", "evaluation.perplexity.others: with finetune.objective.kind transformer_xl"),
        ("perplexity={mode: whole_document}", "is scored with last_window alone"),
    ],
)
def test_what_asks_of_memory_is_refused_for_a_model_without(
    recipe: dict, write_recipe, evaluation: str, message: str
) -> None:
    objective = "finetune.objective={kind: transformer_xl, context: 16, contexts: 2}"
    load_recipe(write_recipe(recipe), [objective])
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(recipe), [objective, f"evaluation.{evaluation}"])
    assert message in str(error.value)


def test_a_revision_is_described_where_there_is_one(recipe: dict, write_recipe) -> None:
    path = write_recipe(recipe)
    assert "revision" not in load_recipe(path).described()["base"]
    described = load_recipe(path, ["base={checkpoint: a/b, revision: v2}"]).described()
    assert described["base"]["revision"] == "v2"


def test_what_everybody_may_read_of_a_recipe_shows_no_credentials(recipe: dict, write_recipe) -> None:
    path = "s3://key:secret@bucket/dir?token=secret"
    recipe["finetune"]["checkpoints"] = {"path": path}
    loaded = load_recipe(write_recipe(recipe))
    assert loaded.finetune.checkpoints.path == path
    described = loaded.described()
    assert described["finetune"]["checkpoints"]["path"] == "s3://bucket/dir"
    assert "secret" not in json.dumps(described)
