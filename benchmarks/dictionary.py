"""How far the memory of models trained on the dictionary task reaches: table, plot, CPU time of training.

    python -m benchmarks.dictionary recipes/dictionary.yaml OUTPUT [--seeds 0 1 2] [--tokens 16384 65536 ...]

Trains the recipe's model for each seed (what is there already is not trained again) and asks dictionaries of each
size; OUTPUT/seed-N holds model, metrics.jsonl and accuracy.json of a seed, OUTPUT/accuracy.png the plot.
"""

import argparse
from pathlib import Path

import torch
import yaml

from jobs.dictionary.config import DictionaryRecipe
from jobs.dictionary.evaluate import accuracy, summarize
from jobs.dictionary.plot import plot_accuracy
from jobs.dictionary.train import train_seed
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
    print("CPU minutes of training:", ", ".join(f"{taken:.1f} (seed {seed})" for seed, taken in minutes.items()))
    rows, _ = summarize(by_seed, settings.top_k)
    print("\n| memory attended to | tokens in memory | median | by seed | value tokens asked a seed |")
    print("|---|---|---|---|---|")
    for row in rows:
        seeds = ", ".join(f"{share:.3f}" for share in row.by_seed)
        print(f"| {row.way} | {row.tokens:,} | {row.median:.3f} | {seeds} | {row.trials} |")
    plot_accuracy(rows, given.output / "accuracy.png")


if __name__ == "__main__":
    main()
