"""How far the memory of models trained on the dictionary task reaches: table, plot, CPU time of training.

    python -m benchmarks.dictionary recipes/dictionary.yaml OUTPUT [--seeds 0 1 2] [--tokens 16384 65536 ...]

Trains the recipe's model for each seed (what is there already is not trained again) and asks dictionaries of each
size; OUTPUT/seed-N holds model, metrics.jsonl and accuracy.json of a seed. `fot run` does the same and records it;
here seeds can be run apart.
"""

import argparse
from pathlib import Path

import torch
import yaml

from jobs.config.dictionary import DictionaryRecipe
from jobs.evaluate.dictionary.accuracy import accuracy
from jobs.evaluate.dictionary.result import dictionary_result
from jobs.evaluate.dictionary.train import train_seed
from jobs.measures.tables import shown
from jobs.train.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", help="by default the recipe's")
    parser.add_argument("--tokens", type=int, nargs="*", help="sizes of the dictionary, by default the recipe's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = DictionaryRecipe.model_validate(yaml.safe_load(given.recipe.read_text()))
    settings = recipe.evaluation
    if given.tokens is not None:
        settings = settings.model_validate({**settings.model_dump(), "tokens": given.tokens})
    by_seed, minutes = {}, {}
    for seed in given.seeds or recipe.seeds:
        output = given.output / f"seed-{seed}"
        output.mkdir(parents=True, exist_ok=True)
        train_seed(recipe, seed, output)
        minutes[seed] = read_metrics(output / "metrics.jsonl")[-1]["cpu_seconds"] / 60
        if settings.tokens:
            by_seed[seed] = accuracy(output / "model", settings, seed, output)
    result = dictionary_result(by_seed, settings, minutes, given.output)
    result.write(given.output)
    for table in result.tables:
        print(f"{table.note}\n\n| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
        for row in table.rows:
            print(f"| {' | '.join(map(shown, row))} |")


if __name__ == "__main__":
    main()
