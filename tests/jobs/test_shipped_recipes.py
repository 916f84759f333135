"""The recipes that ship can be read, and their data parts work."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from jobs.recipe import load_recipe
from pipelines.mixture import BLOCK, Mixture
from pipelines.tokenizer import train_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_valid(path: Path) -> None:
    own = [] if path.stem == "quickstart" else ["base.checkpoint=DIR"]
    if path.stem == "finetune":
        own.append("data.sources.0.path=FILES")
    assert load_recipe(path, own).name.replace("-", "_") == path.stem


def test_the_longllama_mixture_is_the_papers() -> None:
    path = next(path for path in RECIPES if path.stem == "longllama_3b")
    recipe = load_recipe(path, ["base.checkpoint=DIR"])
    assert {source.name: (source.weight, source.min_tokens) for source in recipe.data.sources} == PAPER
    slots = Mixture({source.name: source.weight or 0.0 for source in recipe.data.sources}, seed=0).slots
    assert (slots * 100 / BLOCK).tolist() == [weight for weight, _ in PAPER.values()]
    batch, objective = recipe.finetune.batch, recipe.finetune.objective
    assert batch.micro_batches * batch.groups * len(objective.segments) * objective.context == 256 * 1024
    assert (recipe.finetune.steps, recipe.finetune.optimizer.learning_rate) == (10_000, 2e-5)


def test_the_longllama_mixture_is_prepared_from_files_of_every_source(fot_here, tmp_path: Path) -> None:
    recipe = next(path for path in RECIPES if path.stem == "longllama_3b")
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
    small = ["base.checkpoint=DIR", f"tokenizer.path={tokenizer}", "data.task_bytes=100000"]
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
