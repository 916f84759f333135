"""What a job will need, against what the cluster has."""

from collections.abc import Iterator

from jobs.dictionary.config import DictionaryRecipe
from jobs.plan import base_shape
from jobs.recipe import Recipe
from jobs.submit.cluster import Cluster, Resources
from jobs.train.estimate import device_memory, gate_layers, parameters, step_flops, tokens_per_step
from pipelines.errors import UserError
from pipelines.progress import human


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


def check_fits(recipe: Recipe | DictionaryRecipe, cluster: Cluster) -> str | None:
    """A remark where the cluster must grow. Raises UserError where it does not and never has the room."""
    each, wanted = per_worker(recipe), workers(recipe)
    if not each or (fit := fitting(each, cluster)) >= wanted:
        return None
    want = f"{wanted} {'worker' if wanted == 1 else 'workers'} with {counted(each)} each"
    if not cluster.grows:
        remedy = f"lower resources.workers (--set resources.workers={fit}) or " if fit else ""
        raise UserError(
            f"resources: {want} never fit the cluster, which has room for {fit} and does not grow: {remedy}use a "
            f"larger cluster"
        )
    return f"{want}: there is room for {fit}, the autoscaler must add nodes"


def needs_view(recipe: Recipe | DictionaryRecipe, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """(what, in words): of the job and of the cluster."""
    each, wanted = per_worker(recipe), workers(recipe)
    if each:
        total = {kind: wanted * count for kind, count in each.items()}
        yield "training", f"{wanted} x ({counted(each)}): {counted(total)}; everything else takes CPUs as they are free"
    else:
        yield "needs", "CPUs, as they are free"
    yield from planned(recipe)
    nodes = "1 node" if len(cluster.nodes) == 1 else f"{len(cluster.nodes)} nodes"
    grows = ", and grows" if cluster.grows else ""
    yield "cluster", f"{nodes}, {counted(cluster.total)}, free now {counted(cluster.free)}{grows}"


def planned(recipe: Recipe | DictionaryRecipe) -> Iterator[tuple[str, str]]:
    """A line a training: what `fot plan` says of it, as far as the shape of the base is known here."""
    if isinstance(recipe, DictionaryRecipe):
        return
    try:
        shape = base_shape(recipe)
    except UserError:
        return
    for name, training in recipe.trainings.items():
        count = parameters(shape, gate_layers(training.objective, shape.num_hidden_layers))
        tokens, flops = tokens_per_step(training) * training.steps, step_flops(shape, training) * training.steps
        memory = device_memory(shape, training, recipe.resources).total / 1e9
        yield (
            name,
            f"{human(count)} parameters, {human(tokens)} tokens in {training.steps:,} steps, {flops:.3g} FLOPs, "
            f"{memory:.1f} GB a worker",
        )


def counted(resources: Resources) -> str:
    """{"CPU": 2.0, "GPU": 1.0} -> '2 CPUs and 1 GPU'."""
    parts = [f"{count:g} {kind}{'' if count == 1 else 's'}" for kind, count in resources.items() if count]
    return " and ".join(parts) or "nothing"
