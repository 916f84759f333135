"""What runs on a cluster and how people ask for it: recipes, training, evaluation, registry, the `fot` command.

Arrows of imports go down this list, never up:

    cli/         the `fot` command line
    schedule/    recipes that run by cron
    cluster/     recipes as jobs of a Ray cluster
    workflow/    all stages of a recipe, run and reported: the one place that knows all of the below
    probe/       which layers of a LLaMA retrieve
    evaluate/    what a model can do
    registry/    MLflow: runs, models, the champion
    train/       DeepSpeed ZeRO jobs on Ray Train
    measures/    windows of text, losses of tokens, results
    models/      the LLaMA that is begun with
    config/      every part of a recipe
    common/      small leaves: errors, stops, plots
"""
