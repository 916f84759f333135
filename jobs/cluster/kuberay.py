"""`fot manifest`: what runs a recipe on Kubernetes with KubeRay, a RayJob or (by cron) a RayCronJob.

It is a job like those of `fot submit`: the recipe, with what was set, is in its metadata, so the image needs this
package alone. The cluster made for it has a head that only drives, data workers (CPUs) and training workers as many and
as large as the recipe asks for; both groups grow from zero with what waits to be run and shrink to zero again. Every
pod has one claim at /shared: relative paths of the recipe, work_dir among them, lie there.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from jobs.cluster.job import ENTRY, STOP_SECONDS, login, make_metadata
from jobs.cluster.package import WORK_DIR, absolute, holds_credentials, load_all
from jobs.common.cron import check_cron
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.settings import Content, read_overridden
from jobs.config.training import Resources
from jobs.config.variants import load_comparison
from pipelines.workflow.errors import UserError
from pipelines.workflow.hashing import hash_json

Manifest = dict[str, Any]
SHARED = "/shared"
NAME_LENGTH = 36  # KubeRay appends up to 17 characters to name a RayCronJob's RayJobs and their clusters, of 53 at most
RETRIES = 2  # each on a new cluster, going on from the finished stages and the last checkpoint
IDLE_SECONDS = 300
HEAD = {"cpu": "4", "memory": "16Gi"}
DATA_WORKER = {"cpu": "8", "memory": "32Gi"}
DATA_WORKERS = 8
GPU = "nvidia.com/gpu"
GPU_WORKER_GIB, CPU_WORKER_GIB = 64, 8  # of a training worker
GROUP = 100  # of the user that Ray's images run as, who else could not write to the claim


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
    """Print the manifest of a recipe file as YAML, for `kubectl apply -f -`. Raises UserError as `make_manifest` does,
    and for a recipe that is wrong."""
    comparison = load_comparison(path, overrides)
    recipe = load_recipe(path, overrides) if comparison is None else comparison.common
    content = read_overridden(path, overrides)
    content.setdefault(WORK_DIR, recipe.work_dir)
    every = [each.resources for each in load_all(path, overrides).values() if isinstance(each, Recipe)]
    made = make_manifest(content, recipe.name, every, deployment)
    print(yaml.dump(made, Dumper=_Dumper, sort_keys=False, width=120), end="")


def make_manifest(content: Content, name: str, every: Iterable[Resources], deployment: Deployment) -> Manifest:
    """The RayJob or RayCronJob that runs a recipe. `content`: the keys of its file; `every`: what it asks for, or what
    each of its variants does.

    Raises UserError where pods would not see a path, the recipe holds credentials, or a name, cron line or time zone
    is not one.
    """
    content = _on_the_claim(content)
    if (key := holds_credentials(content)) is not None:
        raise UserError(
            f"{key} holds credentials, and a manifest is no secret: put them into a Secret as environment variables "
            f"(MLFLOW_TRACKING_URI, AWS_ACCESS_KEY_ID), and name that with --secret"
        )
    called = kubernetes_name(name)
    code = {"version": version("fot"), "hash": hash_json(version("fot"))}  # the image's, from the package's wheel
    metadata = make_metadata(called, 1, name, _owner(), {}, json.dumps(code), shell_yaml(content))
    spec, kind = ray_job_spec(metadata, every, deployment), "RayJob"
    if deployment.cron is not None:
        check_cron(deployment.cron, deployment.time_zone)
        kind = "RayCronJob"
        spec = {"schedule": deployment.cron, "timeZone": deployment.time_zone, "jobTemplate": spec}
    place = {} if deployment.namespace is None else {"namespace": deployment.namespace}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": called, **place}, "spec": spec}


def shell_yaml(content: Content) -> str:
    """As YAML in ASCII without what a shell replaces between double quotes, where KubeRay puts it: "$" is a \\u0024."""
    text = yaml.dump(content, Dumper=_ShellDumper, sort_keys=False, width=120)
    return text.replace("$", r"\u0024").replace("`", r"\u0060")


def kubernetes_name(name: str) -> str:
    """A recipe's name as KubeRay takes it: 'LLaMA_3b.v2' -> 'llama-3b-v2'. Raises UserError where it is too long."""
    plain = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"fot-{plain}".rstrip("-")
    if len(plain) > NAME_LENGTH:
        raise UserError(f"name {name}: on Kubernetes at most {NAME_LENGTH} characters: --set name=SHORTER")
    return plain


def ray_job_spec(metadata: Mapping[str, str], every: Iterable[Resources], deployment: Deployment) -> Manifest:
    """The spec of a RayJob. `metadata`: the job's, with its recipe."""
    head = _pod(deployment, HEAD)
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    head["spec"]["containers"][0]["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    return {
        "entrypoint": f"exec python -m {ENTRY}",
        "metadata": dict(metadata),
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
                _training_group(every, deployment),
            ],
        },
    }


def training_pods(resources: Resources, gpus_per_node: int) -> tuple[int, int]:
    """(pods, workers of a pod): as few pods as hold all workers; without GPUs one worker a pod."""
    most = gpus_per_node if resources.gpus_per_worker else 1
    pods = -(-resources.workers // most)
    return pods, -(-resources.workers // pods)


def _training_group(every: Iterable[Resources], deployment: Deployment) -> Manifest:
    """One that has room for each of them: as many pods as one asks for, each as large as one asks for."""
    asked = [_training_pods(resources, deployment.gpus_per_node) for resources in every]
    pods, cpus, gpus, memory = (max(each) for each in zip(*asked, strict=True))
    takes = {"cpu": str(cpus), "memory": f"{memory}Gi"}
    if not gpus:
        return _group("training", pods, _pod(deployment, takes))
    pod = _pod(deployment, {**takes, GPU: str(gpus)})
    pod["spec"]["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]  # of nodes with GPUs
    return _group("training", pods, pod)


def _training_pods(resources: Resources, gpus_per_node: int) -> tuple[int, int, int, int]:
    """How many, and of each the CPUs, GPUs and GiB."""
    pods, workers = training_pods(resources, gpus_per_node)
    memory = GPU_WORKER_GIB if resources.gpus_per_worker else CPU_WORKER_GIB
    return pods, workers * resources.cpus_per_worker, workers * resources.gpus_per_worker, workers * memory


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
        "volumeMounts": [{"name": "shared", "mountPath": SHARED}],
    }
    if deployment.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": deployment.secret}}]
    return {
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {"fsGroup": GROUP, "fsGroupChangePolicy": "OnRootMismatch"},
            "containers": [container],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": deployment.claim}}],
        }
    }


def _owner() -> str:
    """Without what the shell would replace that KubeRay puts it into."""
    return re.sub("[$`]", "_", login("set USER"))


def _on_the_claim(content: Content) -> Content:
    """The recipe with every path absolute, as pods mean them. Raises UserError for one that they do not see."""
    changed = absolute(content, SHARED)
    for (key, given), (_, path) in zip(_texts(content), _texts(changed), strict=True):
        elsewhere = path.startswith("/") and not PurePosixPath(path).is_relative_to(SHARED)
        if elsewhere or given.startswith("~"):
            raise UserError(
                f"{key} is {given}, on this machine, but pods see the claim alone, at {SHARED}: give a path on it, "
                f"relative or under {SHARED} (--set {key}=PATH)"
            )
    return changed


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a recipe, with its key: ("data.sources.0.path", "corpora/books")."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


class _ShellDumper(yaml.SafeDumper):
    """Texts that a shell would change in double quotes, where YAML has escapes."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[$`]", text) else None)


_Dumper.add_representer(str, _block)
_ShellDumper.add_representer(str, _quoted)
