"""`fot manifest`: what runs a recipe on Kubernetes with KubeRay, a RayJob or (by cron) a RayCronJob.

The recipe, with what was set, is in a ConfigMap, so the image needs this package alone. The cluster made for a run has
a head that only drives, data workers (CPUs) and training workers as many and as large as the recipe asks for; both
groups grow from zero with what waits to be run and shrink to zero again. Every pod has one claim at /shared, the
working directory of the run: relative paths of the recipe, work_dir among them, lie there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from jobs.cron import check_cron
from jobs.recipe import Recipe, load_recipe
from jobs.settings import Content, read_overridden
from jobs.submit.package import holds_credentials
from jobs.train.config import Resources
from jobs.variants import load_comparison
from pipelines.errors import UserError

Manifest = dict[str, Any]
SHARED = "/shared"
RECIPE = "/etc/fot/recipe.yaml"
NAME_LENGTH = 36  # KubeRay appends up to 17 characters to name a RayCronJob's RayJobs and their clusters, of 53 at most
RETRIES = 2  # each on a new cluster, going on from the finished stages and the last checkpoint
IDLE_SECONDS = 300
HEAD = {"cpu": "4", "memory": "16Gi"}
DATA_WORKER = {"cpu": "8", "memory": "32Gi"}
DATA_WORKERS = 8
GPU = "nvidia.com/gpu"
GPU_WORKER_GIB, CPU_WORKER_GIB = 64, 8  # of a training worker


@dataclass(frozen=True)
class Deployment:
    """Where a recipe runs on Kubernetes.

    `image`: has this package and its Ray; `claim`: the PersistentVolumeClaim, ReadWriteMany, at /shared; `secret`: the
    Secret whose keys become environment variables; `gpus_per_node`: how many a training pod may have; `cron`: five
    fields, read in `time_zone`, instead of one run now.
    """

    image: str
    claim: str
    namespace: str | None = None
    secret: str | None = None
    gpus_per_node: int = 8
    cron: str | None = None
    time_zone: str = "UTC"


def show_manifest(path: Path, overrides: Sequence[str], deployment: Deployment) -> None:
    """Print the manifests of a recipe file as YAML, for `kubectl apply -f -`. Raises UserError as `manifests` does, and
    for a recipe that is wrong."""
    comparison = load_comparison(path, overrides)
    recipe = load_recipe(path, overrides) if comparison is None else comparison.common
    content = read_overridden(path, overrides)
    print(yaml.dump_all(manifests(content, recipe, deployment), Dumper=_Dumper, sort_keys=False, width=120), end="")


def manifests(content: Content, recipe: Recipe, deployment: Deployment) -> list[Manifest]:
    """The ConfigMap that holds the recipe (`content`: the keys of its file), and the RayJob or RayCronJob that runs it.

    Raises UserError where pods would not see a path, the recipe holds credentials, or a name, cron line or time zone
    is not one.
    """
    _check_paths(content)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
    if (key := holds_credentials(content)) is not None:
        raise UserError(
            f"{key} holds credentials, and a manifest is no secret: put them into a Secret as environment variables "
            f"(MLFLOW_TRACKING_URI, AWS_ACCESS_KEY_ID), and name that with --secret"
        )
    name = kubernetes_name(recipe.name)
    place = {} if deployment.namespace is None else {"namespace": deployment.namespace}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe", **place},
        "data": {PurePosixPath(RECIPE).name: text},
    }
    spec = ray_job_spec(f"{name}-recipe", recipe.resources, deployment)
    kind = "RayJob"
    if deployment.cron is not None:
        check_cron(deployment.cron, deployment.time_zone)
        kind = "RayCronJob"
        spec = {"schedule": deployment.cron, "timeZone": deployment.time_zone, "jobTemplate": spec}
    job = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name, **place}, "spec": spec}
    return [config_map, job]


def kubernetes_name(name: str) -> str:
    """A recipe's name as KubeRay takes it: 'LLaMA_3b.v2' -> 'llama-3b-v2'. Raises UserError where it is too long."""
    plain = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"fot-{plain}".rstrip("-")
    if len(plain) > NAME_LENGTH:
        raise UserError(f"name {name}: on Kubernetes at most {NAME_LENGTH} characters: --set name=SHORTER")
    return plain


def ray_job_spec(recipe: str, resources: Resources, deployment: Deployment) -> Manifest:
    """The spec of a RayJob. `recipe`: the name of the ConfigMap that holds it."""
    head = _pod(deployment, HEAD)
    head["spec"]["containers"][0]["env"] = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    _add_volume(head, "recipe", str(PurePosixPath(RECIPE).parent), {"configMap": {"name": recipe}})
    return {
        "entrypoint": f"bash -c 'cd {SHARED} && fot run {RECIPE}'",  # one word: KubeRay puts it into a shell's line
        "shutdownAfterJobFinishes": True,
        "backoffLimit": RETRIES if deployment.cron is None else 0,  # by cron the next firing goes on
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_SECONDS},
            "headGroupSpec": {
                "serviceType": "ClusterIP",  # inside Kubernetes only; kubectl port-forward leads to the dashboard
                "enableIngress": False,
                "rayStartParams": {"num-cpus": "0"},  # it drives, and runs no task
                "template": head,
            },
            "workerGroupSpecs": [
                _group("data", DATA_WORKERS, _pod(deployment, DATA_WORKER)),
                _training_group(resources, deployment),
            ],
        },
    }


def training_pods(resources: Resources, gpus_per_node: int) -> tuple[int, int]:
    """(pods, workers of a pod): as few pods as hold all workers; without GPUs one worker a pod."""
    most = gpus_per_node if resources.gpus_per_worker else 1
    pods = -(-resources.workers // most)
    return pods, -(-resources.workers // pods)


def _training_group(resources: Resources, deployment: Deployment) -> Manifest:
    pods, workers = training_pods(resources, deployment.gpus_per_node)
    gpus = workers * resources.gpus_per_worker
    memory = workers * (GPU_WORKER_GIB if gpus else CPU_WORKER_GIB)
    takes = {"cpu": str(workers * resources.cpus_per_worker), "memory": f"{memory}Gi"}
    if not gpus:
        return _group("training", pods, _pod(deployment, takes))
    pod = _pod(deployment, {**takes, GPU: str(gpus)})
    pod["spec"]["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]  # of nodes with GPUs
    return _group("training", pods, pod)


def _group(name: str, most: int, pod: Manifest) -> Manifest:
    """A group of 0 to `most` workers. Its nodes carry their role, so that tasks can keep away from some."""
    return {
        "groupName": name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": most,
        "labels": {"role": name},
        "rayStartParams": {},
        "template": pod,
    }


def _pod(deployment: Deployment, takes: Mapping[str, str]) -> Manifest:
    """The template of pods with one Ray container, which takes so much of a node, and the claim."""
    container: Manifest = {
        "name": "ray",
        "image": deployment.image,
        "resources": {"requests": dict(takes), "limits": dict(takes)},
    }
    if deployment.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": deployment.secret}}]
    pod: Manifest = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    _add_volume(pod, "shared", SHARED, {"persistentVolumeClaim": {"claimName": deployment.claim}})
    return pod


def _add_volume(pod: Manifest, name: str, path: str, source: Manifest) -> None:
    pod["spec"].setdefault("volumes", []).append({"name": name, **source})
    pod["spec"]["containers"][0].setdefault("volumeMounts", []).append({"name": name, "mountPath": path})


def _check_paths(content: Content) -> None:
    """Raises UserError for a path of this machine, which pods do not see."""
    for key, text in _texts(content):
        if text.startswith(("/", "~")) and not PurePosixPath(text).is_relative_to(SHARED):
            raise UserError(
                f"{key} is {text}, on this machine, but pods see the claim alone, at {SHARED}: give a path on it, "
                f"relative or under {SHARED} (--set {key}=PATH)"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a recipe, with its key: ("data.sources.0.path", "corpora/books")."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)
