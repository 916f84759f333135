"""What runs on a cluster and how people ask for it: recipes, training, evaluation, registry, the `fot` command."""
