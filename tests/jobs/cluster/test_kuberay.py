"""Manifests fit KubeRay's and Kubernetes' schemas, hold the recipe, and refuse what would not run."""

import json
import re
import subprocess
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from jobs.cluster.entry import GIVEN, Given
from jobs.cluster.job import Job, read_job
from jobs.cluster.kuberay import (
    GPU,
    Deployment,
    kubernetes_name,
    make_manifest,
    shell_yaml,
    show_manifest,
    training_pods,
)
from jobs.cluster.preflight import check_code
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.training import Resources
from pipelines.workflow.errors import UserError

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads(Path(__file__).with_name("data").joinpath("kuberay_schema.json").read_text())
HERE = Deployment("registry/fot:1", "fot-shared")
NIGHTLY = Deployment(
    "registry/fot:1", "fot-shared", namespace="research", secret="fot", cron="0 2 * * *", time_zone="Europe/Berlin"
)


def check(manifest: dict, kind: str | None = None) -> None:
    """Raises ValidationError where Kubernetes would refuse or drop a part of it."""
    schema = {"$ref": f"#/$defs/{kind or manifest['kind']}", "$defs": SCHEMA["$defs"]}
    Draft202012Validator(schema).validate(manifest)


@pytest.fixture
def of(recipe):
    """The manifest of a small recipe with some keys set."""

    def make(deployment: Deployment = HERE, **changes: object) -> dict:
        content = {**recipe, "data": {"sources": [{"name": "words", "path": "corpus.jsonl"}]}, **changes}
        valid = Recipe.model_validate(content)
        return make_manifest(content, valid.name, [valid.resources], deployment)

    return make


def groups(job: dict) -> dict[str, dict]:
    spec = job["spec"].get("jobTemplate", job["spec"])
    return {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}


def recipe_of(job: dict) -> dict:
    return yaml.safe_load(job["spec"].get("jobTemplate", job["spec"])["metadata"]["fot.recipe"])


def submitted(spec: dict) -> list[str]:
    """The arguments that `ray` gets in the shell's line that KubeRay makes of a RayJob's spec: metadata as JSON, as
    Go's json.Marshal and then its strconv.Quote write them, and the entrypoint as it is."""
    marshalled = json.dumps(spec["metadata"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&":
        marshalled = marshalled.replace(letter, f"\\u{ord(letter):04x}")
    assert marshalled.isascii()  # of other letters Go escapes some as JSON does not
    quoted = '"' + marshalled.replace("\\", "\\\\").replace('"', '\\"') + '"'
    line = f"if true ; then ray job submit --metadata-json {quoted} -- {spec['entrypoint']} ; fi ; "
    assert "$(" not in line  # Kubernetes replaces $(NAME) before any shell
    shell = ["bash", "-c", "ray() { printf '%s\\0' \"$@\"; }; " + line]
    return subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def limits(group: dict) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    return container["resources"]["limits"]


@pytest.mark.parametrize("deployment", [HERE, NIGHTLY])
@pytest.mark.parametrize("gpus", [0, 1])
def test_manifests_fit_the_schemas(of, deployment, gpus) -> None:
    job = of(deployment, resources={"workers": 2, "gpus_per_worker": gpus})
    assert job["kind"] == ("RayCronJob" if deployment.cron else "RayJob")
    check(job)


def test_the_schema_refuses_any_name_that_is_changed(of) -> None:
    """Kubernetes drops unknown fields without a word: every field's name counts."""
    job = of(NIGHTLY, resources={"workers": 2, "gpus_per_worker": 1})
    job["spec"]["jobTemplate"]["metadata"].clear()  # any name may stand there, and in these
    free = {"labels", "rayStartParams", "limits", "requests"}

    def rename_each(at: dict | list) -> int:
        renamed = 0
        for key in list(at) if isinstance(at, dict) else range(len(at)):
            if isinstance(at, dict):
                at["another"] = at.pop(key)
                with pytest.raises(ValidationError):
                    check(job, "RayCronJob")
                at[key] = at.pop("another")
                renamed += 1
            if isinstance(at[key], dict | list) and key not in free:
                renamed += rename_each(at[key])
        return renamed

    assert rename_each(job) > 80
    check(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metadata", "name"), "Capital"),
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "none"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), "0"),
    ],
)
def test_the_schema_refuses_values_of_another_kind(of, path, value) -> None:
    job = of()
    at = job
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    with pytest.raises(ValidationError):
        check(job)


def test_the_recipe_is_carried_with_what_was_set(recipe, write_recipe, capsys) -> None:
    recipe["data"]["sources"][0]["path"] = "corpora/words.jsonl"
    overrides = ["finetune.steps=7", "registry.tracking_uri=null"]
    show_manifest(write_recipe(recipe), overrides, HERE)
    printed = capsys.readouterr().out
    job = yaml.safe_load(printed)
    check(job)
    assert "    fot.recipe: |\n" in printed  # to be read by people
    carried = recipe_of(job)
    assert (carried["work_dir"], carried["data"]["sources"][0]["path"]) == (
        "/shared/runs",
        "/shared/corpora/words.jsonl",
    )
    recipe["data"]["sources"][0]["path"] = "/shared/corpora/words.jsonl"
    recipe["work_dir"] = "/shared/runs"
    set_by_hand, unset = load_recipe(write_recipe(recipe), overrides), load_recipe(write_recipe(recipe))
    assert load_recipe(write_recipe(carried)) == set_by_hand != unset


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_shipped_recipe_has_manifests(name, capsys) -> None:
    path = ROOT / f"recipes/{name}.yaml"
    if yaml.safe_load(path.read_text()).get("kind") == "dictionary":
        with pytest.raises(UserError, match="only `fot run`"):
            show_manifest(path, [], HERE)
        return
    yours = ["base.checkpoint=llama", "data.sources.0.path=corpora"]
    show_manifest(path, yours if name == "finetune" else [], HERE)
    check(yaml.safe_load(capsys.readouterr().out))


def test_a_comparison_keeps_its_variants(capsys) -> None:
    show_manifest(ROOT / "recipes/baselines.yaml", [], HERE)
    assert recipe_of(yaml.safe_load(capsys.readouterr().out))["variants"]


def test_training_pods_have_room_for_every_variant(recipe, write_recipe, capsys) -> None:
    recipe["data"]["sources"][0]["path"] = "corpus.jsonl"
    batches = {f"{part}.batch.micro_batches": 8 for part in ("finetune", "base.pretrain.training")}
    gpus = {"resources.gpus_per_worker": 1, **batches}
    many = {"resources.workers": 8, **gpus}
    wide = {"resources.workers": 4, "resources.cpus_per_worker": 16, **gpus}
    path = write_recipe({**recipe, "variants": {"many": {"set": many}, "wide": {"set": wide}}})
    show_manifest(path, [], HERE)
    group = groups(yaml.safe_load(capsys.readouterr().out))["training"]
    assert (group["maxReplicas"], limits(group)["cpu"], limits(group)[GPU]) == (1, "64", "8")


def test_the_owner_is_nothing_to_a_shell(of, monkeypatch) -> None:
    monkeypatch.setenv("LOGNAME", "a$HOME`id`")
    assert of()["spec"]["metadata"]["fot.owner"] == "a_HOME_id_"


@pytest.mark.parametrize(
    ("workers", "gpus", "gpus_per_node", "pods", "of_each"),
    [(1, 1, 8, 1, 1), (8, 1, 8, 1, 8), (16, 1, 8, 2, 8), (12, 1, 8, 2, 6), (8, 1, 4, 2, 4), (3, 0, 8, 3, 1)],
)
def test_training_pods_are_few_and_alike(of, workers, gpus, gpus_per_node, pods, of_each) -> None:
    resources = Resources(workers=workers, cpus_per_worker=3, gpus_per_worker=gpus)
    assert training_pods(resources, gpus_per_node) == (pods, of_each)
    training = {"batch": {"micro_batches": workers, "groups": 2}}
    finetune = {"objective": {"kind": "fot", "context": 16, "mem_layers": [1]}, "steps": 6, **training}
    base = {"checkpoint": "checkpoints/llama"}
    job = of(
        Deployment("image", "claim", gpus_per_node=gpus_per_node),
        base=base,
        finetune=finetune,
        resources=resources.model_dump(),
    )
    group = groups(job)["training"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, pods)
    assert limits(group)["cpu"] == str(3 * of_each)
    assert limits(group).get(GPU) == (str(of_each) if gpus else None)
    assert ("tolerations" in group["template"]["spec"]) == bool(gpus)


def test_data_workers_and_the_head_have_no_gpu_and_groups_begin_at_none(of) -> None:
    job = of(resources={"workers": 2, "gpus_per_worker": 1})
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert GPU not in limits(head)
    assert head["rayStartParams"]["num-cpus"] == "0"
    data = groups(job)["data"]
    assert GPU not in limits(data)
    assert (data["replicas"], data["minReplicas"]) == (0, 0)
    assert {name: group["labels"] for name, group in groups(job).items()} == {
        "data": {"role": "data"},
        "training": {"role": "training"},
    }


def test_nothing_is_exposed_and_everything_ends(of) -> None:
    job = of()
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["rayVersion"] == version("ray")
    assert "ports" not in json.dumps(job)


def test_every_pod_has_the_claim_and_the_secret(of) -> None:
    job = of(NIGHTLY)
    cluster = job["spec"]["jobTemplate"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "fot-shared"}
        assert mounts["shared"] == "/shared"
        assert set(mounts) == set(volumes)
        assert container["envFrom"] == [{"secretRef": {"name": "fot"}}]
        assert spec["securityContext"] == {"fsGroup": 100, "fsGroupChangePolicy": "OnRootMismatch"}  # of Ray's images


def test_it_is_a_job_of_ours_which_stops_when_asked(of) -> None:
    spec = of()["spec"]
    arguments = submitted(spec)
    assert arguments[:3] == ["job", "submit", "--metadata-json"]
    assert arguments[4:] == ["--", "exec", "python", "-m", "jobs.cluster.entry"]
    metadata = json.loads(arguments[3])
    job = read_job({"submission_id": "tiny-abcde", "metadata": metadata, "status": "RUNNING"})
    assert isinstance(job, Job)
    assert (job.name, job.attempt, job.first) == ("tiny", 1, "tiny")
    handed = {GIVEN: json.dumps({"metadata": {**metadata, "job_submission_id": job.id}})}  # by Ray, to the driver
    given = Given.of(handed)
    assert (given.job_id, given.recipe, given.version) == (job.id, job.recipe, version("fot"))
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in head["env"]


def test_it_asks_for_the_version_that_a_wheel_has_and_not_for_this_checkouts(of, monkeypatch) -> None:
    given = json.loads(of()["spec"]["metadata"]["fot.code"])["version"]
    monkeypatch.setattr("jobs.cluster.preflight.code_version", lambda: version("fot"))
    check_code(given)
    monkeypatch.setattr("jobs.cluster.preflight.code_version", lambda: "0.0")
    with pytest.raises(UserError, match="install the same version"):
        check_code(given)


@pytest.mark.parametrize(
    "text",
    [
        "$HOME/$(id)/`id`",
        "a \"b\" 'c' \\d\\\\ !e <f>&",
        "two\nlines $x\n",
        "für 本 \U0001f600 \u200b\x7f",
        "\\u0024",
        "*?[a]{b,c};|#",
    ],
)
def test_a_recipe_comes_through_the_shell_as_it_is(of, text) -> None:
    content = of()["spec"]["metadata"] | {"fot.recipe": shell_yaml({"text": text, "more": [text, 1e-5, None]})}
    arguments = submitted({"metadata": content, "entrypoint": "true"})
    recipe = yaml.safe_load(json.loads(arguments[3])["fot.recipe"])
    assert recipe == {"text": text, "more": [text, 1e-5, None]}


def test_a_cron_line_has_its_time_zone_and_all_is_in_the_namespace(of) -> None:
    job = of(NIGHTLY)
    assert (job["spec"]["schedule"], job["spec"]["timeZone"]) == ("0 2 * * *", "Europe/Berlin")
    assert job["spec"]["jobTemplate"]["backoffLimit"] == 0
    assert job["metadata"]["namespace"] == "research"
    assert job["spec"]["jobTemplate"].keys() == of(HERE)["spec"].keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny", "tiny"), ("LLaMA_3b.v2", "llama-3b-v2"), ("7b", "fot-7b"), ("_x_", "x"), ("...", "fot")],
)
def test_names_become_those_that_kubernetes_takes(name, expected) -> None:
    assert kubernetes_name(name) == expected
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", expected)


MISTAKES = [
    (
        {"work_dir": "/home/somebody/runs"},
        {},
        r"^work_dir is /home/somebody/runs, on this machine.*--set work_dir=PATH",
    ),
    ({"work_dir": "~/runs"}, {}, "^work_dir is ~/runs"),
    ({"work_dir": "../runs"}, {}, r"^work_dir is \.\./runs"),
    ({"work_dir": "/shared/../etc"}, {}, r"^work_dir is /shared/\.\./etc"),
    ({"data": {"sources": [{"name": "a", "path": "../corpora/x"}]}}, {}, r"^data\.sources\.0\.path is \.\./corpora/x"),
    ({"data": {"sources": [{"name": "a", "path": "x/../../y"}]}}, {}, r"^data\.sources\.0\.path is x/\.\./\.\./y"),
    ({"data": {"sources": [{"name": "a", "path": "/data/a"}]}}, {}, r"^data\.sources\.0\.path is /data/a"),
    ({"registry": {"tracking_uri": "https://me:hunter2@host"}}, {}, "a manifest is no secret"),
    ({"name": "n" * 37}, {}, "at most 36 characters"),
    ({}, {"cron": "0 2 * *"}, "minute, hour"),
    ({}, {"cron": "TZ=UTC 0 2 * *"}, "minute, hour"),
    ({}, {"cron": "0 2 * * *", "time_zone": "Europe/Berlim"}, "^--time-zone Europe/Berlim: no such"),
    ({}, {"cron": "0 2 * * *", "time_zone": "../etc/passwd"}, "no such time zone"),
]


@pytest.mark.parametrize(("changes", "options", "message"), MISTAKES)
def test_a_mistake_is_one_line(of, changes, options, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        of(Deployment("image", "claim", **options), **deepcopy(changes))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_paths_on_the_claim_and_urls_are_taken(of) -> None:
    paths = {"/shared/a": "/shared/a", "s3://bucket/b/../c": "s3://bucket/b/../c", "c/../d": "/shared/d"}
    sources = [{"name": f"n{number}", "path": path} for number, path in enumerate(paths)]
    carried = recipe_of(of(work_dir="/shared/x/../runs", data={"sources": sources}))
    assert carried["work_dir"] == "/shared/runs"
    assert [source["path"] for source in carried["data"]["sources"]] == list(paths.values())
