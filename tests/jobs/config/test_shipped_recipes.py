"""The recipes that ship can be read, and their data parts work."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from fot_model import cross_batch_plan
from jobs.cluster.plan import ROOM, base_shape
from jobs.config.dictionary import load_dictionary
from jobs.config.recipe import load_recipe
from jobs.config.variants import load_comparison
from jobs.models.backward import Backward
from jobs.train.estimate import device_memory, find_device, step_flops, tokens_per_step
from pipelines.batches.mixture import BLOCK, Mixture
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
PAPER = {  # arXiv 2307.03170, appendix: percent of the tokens, and the least length of a document
    "arxiv": (25, 1),
    "python": (25, 4096),
    "books": (10, 1),
    "common_crawl": (29, 1),
    "c4": (5, 1024),
    "github": (2, 2048),
    "stackexchange": (2, 1024),
    "wikipedia": (2, 1024),
}


LARGE = {  # parameters, memory layers, (positives, negatives) of a group's contexts, base of the rotary frequencies
    "longllama_3b": (3_426_473_600, (6, 12, 18), ((0, 0), (1, 1), (2, 1), (3, 0)), 1e4),
    "longllama_7b": (6_738_415_616, (8, 16, 24), ((0, 0), (1, 2), (2, 5), (3, 4)), 1e4),
    "llama31_8b": (8_030_261_248, (8, 16, 24), ((0, 0), (1, 2), (2, 5), (3, 4)), 5e5),
    "code_llama_7b": (6_738_546_688, (8, 16, 24), ((0, 0), (1, 2), (2, 5), (3, 4)), 1e6),
}


VARIANTS = {
    "baselines": ["standard", "transformer-xl", "memorizing", "fot", "fot-then-memorizing"],
    "distraction": ["d1", "d2", "d8", "d64"],
    "smollm2_rivals": ["fot", "memorizing", "transformer-xl", "longer-context"],
}

SMOLLM2 = ("smollm2", "smollm2_further", "smollm2_gpu")


def shipped(name: str) -> Path:
    return next(path for path in RECIPES if path.stem == name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_valid(path: Path) -> None:
    own = ["base.checkpoint=DIR", "data.sources.0.path=FILES"] if path.stem == "finetune" else []
    if (dictionary := load_dictionary(path)) is not None:
        assert dictionary.name == path.stem
        return
    assert load_recipe(path, own).name.replace("-", "_") == path.stem
    comparison = load_comparison(path, own)
    assert (comparison is not None) == (path.stem in VARIANTS)
    if comparison is not None:
        assert list(comparison.variants) == VARIANTS[path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_its_comments_say_to_set_can_be_set(path: Path) -> None:
    for line in path.read_text().splitlines():
        sets = re.findall(r"--set ([\w.]+=[^\s$]+)(?=\s|$)", line) if line.startswith("#") else []
        if sets:
            load_recipe(path, sets)


def test_without_corpora_smollm2_reads_what_every_machine_has() -> None:
    recipe = load_recipe(shipped("smollm2"), ["data.sources.2=null", "data.sources.3=null"])
    assert [source.name for source in recipe.data.sources] == ["code", "recall"]
    with pytest.raises(UserError, match=r"data\.sources"):
        load_recipe(shipped("smollm2"), [f"data.sources.{place}=null" for place in range(4)])


def test_every_recipe_for_a_large_model_is_checked_here() -> None:
    others = {"quickstart", "finetune", "dictionary", *SMOLLM2, "ten_thousand"}
    assert {path.stem for path in RECIPES} == {*LARGE, *VARIANTS, *others}


def test_variants_of_the_shipped_comparisons_differ_in_what_they_compare_alone() -> None:
    for name in VARIANTS:
        comparison = load_comparison(shipped(name))
        assert comparison is not None
        made = [comparison.recipe(each) for each, variant in comparison.variants.items() if variant.after is None]
        assert len({recipe.base.model_dump_json() for recipe in made}) == 1
        assert len({recipe.finetune.steps for recipe in made}) == 1
        assert len({tokens_per_step(recipe.finetune) for recipe in made}) == 1
        assert len({recipe.evaluation.model_dump_json(exclude={"reader", "local"}) for recipe in made}) == 1
        assert (
            len(
                {
                    recipe.finetune.train if isinstance(recipe.finetune.train, str) else recipe.finetune.train.patterns
                    for recipe in made
                }
            )
            == 1
        )
    distraction = load_comparison(shipped("distraction"))
    assert distraction is not None
    assert [distraction.recipe(name).finetune.objective.d for name in distraction.variants] == [1, 2, 8, 64]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_for_a_large_model_is_the_papers_and_fits_eight_gpus_of_80_gb(name: str) -> None:
    recipe, (count, mem_layers, table, rope_theta) = load_recipe(shipped(name)), LARGE[name]
    made, resources = recipe.finetune, recipe.resources
    shape = base_shape(recipe)
    assert Backward.of(shape, made).parameters == count
    assert recipe.base.shape is not None
    assert recipe.base.shape.rope_theta == rope_theta
    assert (made.objective.mem_layers, made.objective.segments) == (mem_layers, table)
    assert tokens_per_step(made) == 256 * 1024
    assert made.steps * tokens_per_step(made) == pytest.approx(2.6e9, rel=0.01)
    assert (made.steps, made.optimizer.learning_rate, made.optimizer.weight_decay) == (10_000, 2e-5, 0.01)
    assert (made.schedule.kind, made.deepspeed.dtype) == ("constant", "bfloat16")
    assert (resources.workers, resources.gpus_per_worker) == (8, 1)
    for device in (find_device("H100"), find_device("A100 80GB")):
        assert device is not None
        assert device_memory(shape, made, resources).total <= ROOM * device.memory * 1e9


@pytest.mark.parametrize("name", LARGE)
def test_every_context_of_a_large_models_recipe_finds_the_negatives_it_asks_for(name: str) -> None:
    made = load_recipe(shipped(name)).finetune
    table, groups = made.objective.segments, range(made.batch.groups)
    group = [number for number in groups for _ in table]
    unrelated = [[one == other for one in groups] for other in groups]
    plan = cross_batch_plan(group, [*range(len(table))] * len(groups), unrelated, table)
    assert (plan >= 0).sum(1).tolist() == [positives + negatives for positives, negatives in table] * len(groups)


@pytest.mark.parametrize("name", SMOLLM2)
def test_the_recipes_for_smollm2_find_its_layers_and_the_negatives_they_ask_for(name: str) -> None:
    recipe = load_recipe(shipped(name))
    made, shape = recipe.finetune, base_shape(recipe)
    assert (shape.vocab_size, shape.num_hidden_layers, shape.head_dim) == (49152, 30, 64)
    assert Backward.of(shape, made).lowest == made.objective.mem_layers[0]
    table, groups = made.objective.segments, range(made.batch.groups)
    unrelated = [[one == other for one in groups] for other in groups]
    rows = [number for number in groups for _ in table], [*range(len(table))] * len(groups)
    plan = cross_batch_plan(*rows, unrelated, table)
    assert (plan >= 0).sum(1).tolist() == [positives + negatives for positives, negatives in table] * len(groups)


def test_ten_thousand_steps_of_smollm2_take_an_h200_ten_minutes_at_most() -> None:
    recipe = load_recipe(shipped("smollm2_gpu"))
    device = find_device("H200")
    assert device is not None
    assert recipe.finetune.steps == 10_000
    shape = base_shape(recipe)
    assert device_memory(shape, recipe.finetune, recipe.resources).total <= ROOM * device.memory * 1e9
    assert 10_000 * step_flops(shape, recipe.finetune) / (0.4 * device.half * 1e12) <= 600  # at an MFU of 0.4


def test_ten_thousand_steps_are_ten_thousand() -> None:
    made = load_recipe(shipped("ten_thousand"))
    assert (made.finetune.steps, made.finetune.deepspeed.zero_stage, made.resources.workers) == (10_000, 2, 2)


def test_the_code_mixture_reads_repositories_and_theories() -> None:
    sources = {source.name: source for source in load_recipe(shipped("code_llama_7b")).data.sources}
    assert sum(source.weight or 0 for source in sources.values()) == 100
    assert (sources["python"].weight or 0) + (sources["github"].weight or 0) == 80
    assert sources["isabelle"].order == "imports"


@pytest.mark.parametrize("name", [name for name in LARGE if name != "code_llama_7b"])
def test_the_longllama_mixture_is_the_papers(name: str) -> None:
    recipe = load_recipe(shipped(name))
    assert {source.name: (source.weight, source.min_tokens) for source in recipe.data.sources} == PAPER
    slots = Mixture({source.name: source.weight or 0.0 for source in recipe.data.sources}, seed=0).slots
    assert (slots * 100 / BLOCK).tolist() == [weight for weight, _ in PAPER.values()]


def test_the_longllama_mixture_is_prepared_from_files_of_every_source(fot_here, tmp_path: Path) -> None:
    recipe = shipped("longllama_3b")
    for number, name in enumerate(PAPER):
        directory = tmp_path / "corpora" / name
        if name in ("python", "github"):  # a repository is one document
            for repository in "ab":
                (directory / repository).mkdir(parents=True)
                for file in range(8):
                    code = "".join(f"def f_{number}_{repository}_{file}_{line}(): pass\n" for line in range(300))
                    (directory / repository / f"{file}.py").write_text(code)
        else:
            directory.mkdir(parents=True)
            draw = random.Random(number)
            texts = [" ".join(str(draw.random()) for _ in range(1000)) for _ in range(3)]
            short = {"text": f"{name}: too short a document"}
            lines = [json.dumps(record) + "\n" for record in (*({"text": text} for text in texts), short)]
            (directory / "part.jsonl").write_text("".join(lines))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    train_tokenizer(["def f(): pass 0.123456789"] * 9, 300, tokenizer)
    small = [f"tokenizer.path={tokenizer}", "data.task_bytes=100000"]
    small += ["finetune.objective.context=64", "finetune.steps=10"]
    sets = [argument for each in small for argument in ("--set", each)]
    made = fot_here("data", "prepare", recipe, *sets)
    assert made.returncode == 0, made.stdout
    seen = fot_here("data", "inspect", recipe, *sets).stdout
    counts = {line.split()[0]: int(line.split()[1]) for line in seen.splitlines()[1:9]}
    assert counts == {
        name: 2 if name in ("python", "github") else 3 if least > 1 else 4 for name, (_, least) in PAPER.items()
    }
    shown = [fot_here("data", "show", recipe, "--step", step, *sets).stdout.splitlines()[0] for step in range(10)]
    drawn = Counter({name: sum(int(line.split(f"{name} ")[1].split(",")[0]) for line in shown) for name in PAPER})
    assert sum(drawn.values()) == 320
    assert {name for name, _ in drawn.most_common(3)} == {"common_crawl", "arxiv", "python"}
