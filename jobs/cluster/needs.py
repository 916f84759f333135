"""What a job will need, against what the cluster has."""

from collections.abc import Iterator

from jobs.cluster.nodes import Cluster, Resources
from jobs.cluster.package import Recipes
from jobs.cluster.plan import base_shape
from jobs.config.dictionary import DictionaryRecipe
from jobs.config.recipe import Recipe
from jobs.models.backward import Backward
from jobs.train.estimate import device_memory, step_flops, tokens_per_step
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import human


def per_worker(recipe: Recipe | DictionaryRecipe) -> Resources:
    """What each training worker asks for; nothing where there are none."""
    if isinstance(recipe, DictionaryRecipe):
        return {}
    asked = {"CPU": recipe.resources.cpus_per_worker, "GPU": recipe.resources.gpus_per_worker}
    return {kind: float(count) for kind, count in asked.items() if count}


def workers(recipe: Recipe | DictionaryRecipe) -> int:
    return 0 if isinstance(recipe, DictionaryRecipe) else recipe.resources.workers


def fitting(each: Resources, cluster: Cluster) -> int:
    """How many workers fit on the nodes there are, were they free."""
    return sum(min(int(node.get(kind, 0) // count) for kind, count in each.items()) for node in cluster.nodes)


def check_fits(recipes: Recipes, cluster: Cluster) -> str | None:
    """A remark where the cluster must grow for what asks for most. Raises UserError where it does not and never has the
    room."""
    remark, lacking = None, 0
    for name, recipe in recipes.items():
        each, wanted = per_worker(recipe), workers(recipe)
        if not each or (fit := fitting(each, cluster)) >= wanted:
            continue
        want = f"{wanted} {'worker' if wanted == 1 else 'workers'} with {counted(each)} each"
        if cluster.grows is False:
            how = "" if len(recipes) > 1 else f" (--set resources.workers={fit})"  # which a variant may set itself
            remedy = f"lower resources.workers{how} or " if fit else ""
            raise UserError(
                f"{of_variant(name, recipes)}resources: {want} never fit the cluster, which has room for {fit} and "
                f"does not grow: {remedy}use a larger cluster"
            )
        if wanted - fit > lacking:
            grows = "the autoscaler must add nodes" if cluster.grows else "nodes must come: whether any do is not known"
            remark, lacking = f"{want}: there is room for {fit}, {grows}", wanted - fit
    return remark


def needs_view(recipes: Recipes, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """(what, in words): of the job, with the variants that it is true of where that is not all; and of the cluster."""
    of: dict[str, dict[str, list[str]]] = {}
    for name, recipe in recipes.items():
        for what, words in (needed(recipe), *planned(recipe)):
            of.setdefault(what, {}).setdefault(words, []).append(name)
    for what, each in of.items():
        for words, names in each.items():
            yield what, words if len(names) == len(recipes) else f"{words} ({', '.join(names)})"
    nodes = "1 node" if len(cluster.nodes) == 1 else f"{len(cluster.nodes)} nodes"
    free = "what is free is not known yet" if cluster.free is None else f"free now {counted(cluster.free)}"
    grows = {True: ", and grows", False: "", None: "; whether it grows is not known"}[cluster.grows]
    yield "cluster", f"{nodes}, {counted(cluster.total)}, {free}{grows}"


def needed(recipe: Recipe | DictionaryRecipe) -> tuple[str, str]:
    """(what, in words): CPUs and GPUs."""
    each, wanted = per_worker(recipe), workers(recipe)
    if not each:
        return "needs", "CPUs, as they are free"
    total = {kind: wanted * count for kind, count in each.items()}
    return "training", f"{wanted} x ({counted(each)}): {counted(total)}; everything else takes CPUs as they are free"


def planned(recipe: Recipe | DictionaryRecipe) -> Iterator[tuple[str, str]]:
    """A line a training: what `fot plan` says of it, as far as the shape of the base is known here."""
    if isinstance(recipe, DictionaryRecipe):
        return
    try:
        shape = base_shape(recipe)
    except UserError:
        return
    for name, training in recipe.trainings.items():
        count = Backward.of(shape, training).parameters
        tokens, flops = tokens_per_step(training) * training.steps, step_flops(shape, training) * training.steps
        memory = device_memory(shape, training, recipe.resources).total / 1e9
        yield (
            name,
            f"{human(count)} parameters, {human(tokens)} tokens in {training.steps:,} steps, {flops:.3g} FLOPs, "
            f"{memory:.1f} GB a worker",
        )


def of_variant(name: str, recipes: Recipes) -> str:
    """How a line about a recipe begins: it names the variant where there are several."""
    return f"variant {name}: " if len(recipes) > 1 else ""


def counted(resources: Resources) -> str:
    """{"CPU": 2.0, "GPU": 1.0} -> '2 CPUs and 1 GPU'."""
    parts = [f"{count:g} {kind}{'' if count == 1 else 's'}" for kind, count in resources.items() if count]
    return " and ".join(parts) or "nothing"
