"""The cluster launcher's files: Ray's validator, provider and autoscaler take them, and their commands run, as do those
of docs/cluster.md that need no cloud."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import click
import pytest
import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, NodeState, NodeStatus
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import NodeKind
from ray.scripts.scripts import start

from jobs.cluster.kuberay import Deployment, ray_job_spec
from jobs.config.training import Resources
from pipelines.workflow.cluster import KEEP_OFF

ROOT = Path(__file__).parents[1]
AWS, GCP, LOCAL = ROOT / "ray_cluster.yaml", ROOT / "clusters/gcp.yaml", ROOT / "clusters/on_premises.yaml"
FILES = [AWS, GCP, LOCAL]
CLOUDS = [AWS, GCP]
PAGE = (ROOT / "docs/cluster.md").read_text()
ROLES = {"head", "data", "training"}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def cluster(request) -> dict:
    return yaml.safe_load(request.param.read_text())


@pytest.fixture(scope="module")
def aws():
    """Amazon's API, played by moto."""
    from moto import mock_aws

    with mock_aws():  # it sets made-up credentials
        yield


@pytest.fixture(scope="module")
def sized_aws(aws) -> dict:
    """Amazon's file with the resources of its instance types, which Ray asks Amazon for."""
    return AWSNodeProvider.fillout_available_node_types_resources(yaml.safe_load(AWS.read_text()))


def block(language: str, heading: str) -> str:
    """The first block of code of a language below a heading of docs/cluster.md."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE.split(f"## {heading}\n")[1], re.DOTALL)
    assert found is not None
    return found[1]


def commands(cluster: dict) -> list[str]:
    return [command for name, part in cluster.items() if name.endswith("_commands") for command in part]


def test_rays_validator_takes_every_file(cluster) -> None:
    validate_config(prepare_config(cluster))


def test_rays_validator_refuses_a_misspelt_key(cluster) -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="idle_minutes"):
        validate_config(prepare_config({**cluster, "idle_minutes": 3}))


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_clouds_have_the_three_roles_and_grow_from_nothing(path) -> None:
    types = yaml.safe_load(path.read_text())["available_node_types"]
    assert set(types) == ROLES
    assert types["head"]["resources"] == {"CPU": 0}
    for role in ("data", "training"):
        assert types[role]["min_workers"] == 0
        assert types[role]["max_workers"] > 0
        assert types[role]["labels"] == {"role": role}


def test_every_command_is_shell(cluster) -> None:
    for command in commands(cluster):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_ray_start_knows_every_option(cluster) -> None:
    found = [command for command in commands(cluster) if "ray start " in command]
    assert len(found) == 2
    for command in found:
        options = shlex.split(command.split("ray start ")[1])
        start.make_context("start", options)
        with pytest.raises(click.NoSuchOption):
            start.make_context("start", [*options, "--no-such-option"])


def test_the_head_runs_no_task_and_its_dashboard_listens_on_loopback(cluster) -> None:
    (command,) = [command for command in cluster["head_start_ray_commands"] if "ray start " in command]
    options = start.make_context("start", shlex.split(command.split("ray start ")[1])).params
    assert options["num_cpus"] == 0
    assert options["dashboard_host"] == "127.0.0.1"
    assert not any("dashboard-host" in command for command in cluster["worker_start_ray_commands"])


def test_tokens_are_asked_for_on_every_node_and_lie_in_no_file(cluster) -> None:
    if "docker" in cluster:
        assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    else:
        starts = [command for command in commands(cluster) if "ray start " in command]
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    text = yaml.safe_dump(cluster)
    assert not re.search(r"AKIA|BEGIN .*KEY|secret|password|RAY_AUTH_TOKEN", text, re.IGNORECASE)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_images_have_the_pinned_ray_and_python(path) -> None:
    cluster = yaml.safe_load(path.read_text())
    images = {cluster["docker"]["image"]}
    images |= {node["docker"]["worker_image"] for node in cluster["available_node_types"].values() if "docker" in node}
    (pinned,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert images == {f"rayproject/ray:{pinned}-py311-cpu", f"rayproject/ray:{pinned}-py311-gpu"}


def test_every_node_mounts_what_is_shared_before_anything_else(cluster) -> None:
    mounts = [command for command in cluster["initialization_commands"] if "mount -t nfs" in command]
    assert len(mounts) == 1
    assert "docker" not in cluster or "--volume /shared:/shared" in cluster["docker"]["run_options"]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package consists of, in which and as whose home the commands of docs/cluster.md were run."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("fot_model", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(copy), "PIP_NO_INDEX": "1"}
    subprocess.run(["bash", "-e", "-c", block("sh", "Once, for the launcher")], cwd=copy, env=environment, check=True)
    return copy


@pytest.fixture
def install(checkout, tmp_path) -> Callable[[str], None]:
    """Runs a command that installs the package, as on a node but for what the package needs, which is not fetched, and
    looks whether it is there."""
    shutil.copytree(checkout / "build/cluster", tmp_path / "fot")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@"\n')
    (tmp_path / "bin/pip").chmod(0o755)
    (tmp_path / "fot-environment").mkdir()
    (tmp_path / "fot-environment/bin").symlink_to(tmp_path / "bin")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_TARGET": str(tmp_path / "site"),
    }

    def run(command: str) -> None:
        subprocess.run(["bash", "-c", command], env=environment, check=True)
        assert (tmp_path / "site/jobs/train/loop.py").exists()
        assert (tmp_path / "site/pipelines").is_dir()
        assert (tmp_path / "site/fot_model").is_dir()

    return run


def test_the_pages_commands_make_what_the_launcher_copies(checkout, cluster) -> None:
    for path in cluster["file_mounts"].values():
        assert Path(path.replace("~", str(checkout))).exists() or (checkout / path).exists()
    assert (checkout / "build/cluster/constraints.txt").exists()
    assert (checkout / ".ray/auth_token").stat().st_size > 20


def test_the_setup_commands_install_the_package(cluster, install) -> None:
    (command,) = [command for command in cluster["setup_commands"] if " install " in command]
    install(command.replace("'ray[default]' ", ""))  # of the index


def test_the_image_has_the_pinned_ray_and_the_package(checkout, install, tmp_path) -> None:
    lines = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] not in "#"]
    of = {name: [rest for each, rest in lines if each == name] for name in ("FROM", "ARG", "COPY", "RUN")}
    assert sum(map(len, of.values())) == len(lines)
    gpu = yaml.safe_load(AWS.read_text())["available_node_types"]["training"]["docker"]["worker_image"]
    assert of["FROM"] == [gpu]
    image, ignored = tmp_path / "image", (ROOT / ".dockerignore").read_text().splitlines()
    for line in of["COPY"]:
        *sources, target = line.removeprefix("--chown=ray:users ").split()
        for source in sources:
            assert f"!{source}" in ignored
            at = image / target.removeprefix("/")
            if (checkout / source).is_dir():
                shutil.copytree(checkout / source, at)
            else:
                at.mkdir(parents=True, exist_ok=True)
                shutil.copy(checkout / source, at)
    (made, run), (extras,) = of["RUN"], of["ARG"]
    assert made == "mkdir /home/ray/fot"  # not by COPY, whose directories some builders give to root
    # What builds it comes from the index, too; here it is what is installed.
    offline = run.replace("pip install", "pip install --no-build-isolation").replace("/home/ray", f"{image}/home/ray")
    install(f"export {extras}; {offline}")


def test_the_dockerfile_is_without_a_linters_complaint(tmp_path) -> None:
    def linted(dockerfile: Path) -> str:
        hadolint = Path(sys.executable).parent / "hadolint"
        return subprocess.run([hadolint, dockerfile], stdout=subprocess.PIPE, text=True).stdout

    assert linted(ROOT / "Dockerfile") == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text((ROOT / "Dockerfile").read_text().replace("--no-cache-dir ", ""))
    assert "DL3042" in linted(worse)


@pytest.mark.parametrize("there", [True, False])
def test_ray_starts_with_what_a_machines_own_file_says(tmp_path, there) -> None:
    environment, programs = tmp_path / "fot.env", tmp_path / "fot-environment/bin"
    if there:
        environment.write_text("# limits\nFOT_MAX_GPUS=8\nMLFLOW_TRACKING_PASSWORD='a b$c'\n")
    programs.mkdir(parents=True)
    (programs / "ray").write_text("#!/bin/sh\nenv\n")
    (programs / "ray").chmod(0o755)
    for command in commands(yaml.safe_load(LOCAL.read_text())):
        if "ray start " not in command:
            continue
        own = command.replace("/etc/fot.env", str(environment))
        variables = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "HEAD"}
        done = subprocess.run(["bash", "-c", own], env=variables, stdout=subprocess.PIPE, text=True, check=True)
        given = dict(line.split("=", 1) for line in done.stdout.splitlines())
        assert given["RAY_AUTH_MODE"] == "token"
        assert given.get("FOT_MAX_GPUS") == ("8" if there else None)
        assert given.get("MLFLOW_TRACKING_PASSWORD") == ("a b$c" if there else None)


# The autoscaler's own decision about what to launch and to end.


def kuberay(workers: int) -> dict:
    """A manifest's cluster as the autoscaler reads it."""
    spec = ray_job_spec({}, [Resources(workers=workers, gpus_per_worker=1)], Deployment("image", "claim"))
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "fot", "namespace": "default"}, "spec": spec["rayClusterSpec"]}
    )


@pytest.fixture(params=["aws", "gcp", "kuberay"])
def autoscaling(request, sized_aws) -> AutoscalingConfig:
    configs = {"aws": sized_aws, "gcp": yaml.safe_load(GCP.read_text()), "kuberay": kuberay(16)}
    return AutoscalingConfig(deepcopy(configs[request.param]), skip_content_hash=True)


def decide(autoscaling: AutoscalingConfig, tasks=(), gangs=(), idle_seconds: dict[str, float] | None = None):
    """({node type: how many are launched}, requests that wait for ever, {node types that end}), of a head and idle
    nodes."""
    types = autoscaling.get_node_type_configs()
    nodes = {autoscaling.get_head_node_type(): 0.0, **(idle_seconds or {})}
    instances = [_node(name, types[name].resources, seconds) for name, seconds in nodes.items()]
    kinds = {autoscaling.get_head_node_type(): NodeKind.HEAD}
    for instance, name in zip(instances, nodes, strict=True):
        instance.im_instance.node_kind = kinds.get(name, NodeKind.WORKER)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=autoscaling.get_max_num_nodes(),
            idle_timeout_s=autoscaling.get_idle_timeout_s(),
            resource_requests=ResourceRequestUtil.group_by_count(list(tasks)),
            gang_resource_requests=[GangResourceRequest(requests=gang) for gang in gangs],
            current_instances=instances,
        )
    )
    waiting = len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)
    return (
        {each.instance_type: each.count for each in reply.to_launch},
        waiting,
        {each.instance_type for each in reply.to_terminate},
    )


def _node(name: str, resources: dict, idle_seconds: float) -> AutoscalerInstance:
    from ray.core.generated.instance_manager_pb2 import Instance

    state = NodeState(
        node_id=name.encode(),
        instance_id=name,
        ray_node_type_name=name,
        status=NodeStatus.IDLE if idle_seconds else NodeStatus.RUNNING,
        idle_duration_ms=int(1000 * idle_seconds),
        total_resources=resources,
        available_resources=resources,
    )
    instance = Instance(instance_id=name, instance_type=name, status=Instance.RAY_RUNNING, node_id=name)
    return AutoscalerInstance(ray_node=state, cloud_instance_id=name, im_instance=instance)


def tasks(count: int, label_selector: dict[str, str] | None = None) -> list:
    """Tokenization's tasks, as Ray hands them to its autoscaler."""
    selectors = [] if label_selector is None else [[parsed(*each) for each in label_selector.items()]]
    return [ResourceRequestUtil.make({"CPU": 1}, label_selectors=selectors) for _ in range(count)]


def parsed(label: str, value: str) -> tuple:
    operator = (
        LabelSelectorOperator.LABEL_OPERATOR_NOT_IN if value[0] == "!" else LabelSelectorOperator.LABEL_OPERATOR_IN
    )
    return label, operator, [value.lstrip("!")]


def workers(count: int) -> list:
    """A training's placement group."""
    return [ResourceRequestUtil.make({"CPU": 1, "GPU": 1}) for _ in range(count)]


def test_tokenization_launches_data_workers_alone(autoscaling) -> None:
    a_node = autoscaling.get_node_type_configs()["data"].resources["CPU"]
    assert decide(autoscaling, tasks(1))[0] == {"data": 1}
    assert decide(autoscaling, tasks(3 * a_node))[0] == {"data": 3}


def test_a_task_that_asks_for_memory_gets_a_data_worker(autoscaling) -> None:
    asks = [ResourceRequestUtil.make({"CPU": 1, "memory": 20e9})]
    assert decide(autoscaling, asks) == ({"data": 1}, 0, set())


def test_more_tokenization_than_all_data_workers_take_waits_if_it_keeps_off_training_workers(autoscaling) -> None:
    data = autoscaling.get_node_type_configs()["data"]
    all_of_them = data.max_worker_nodes * int(data.resources["CPU"])
    assert decide(autoscaling, tasks(all_of_them + 5, KEEP_OFF))[:2] == (
        {"data": data.max_worker_nodes},
        5,
    )
    # Without the label the autoscaler prefers nodes without GPUs, but takes others when these are all busy.
    assert "training" in decide(autoscaling, tasks(all_of_them + 5))[0]


def test_a_training_launches_training_workers_alone(autoscaling) -> None:
    assert decide(autoscaling, gangs=[workers(8)]) == ({"training": 1}, 0, set())
    assert decide(autoscaling, gangs=[workers(16)]) == ({"training": 2}, 0, set())
    assert decide(autoscaling, gangs=[workers(17)])[:2] == ({}, 1)


def test_evaluation_on_gpus_launches_training_workers(autoscaling) -> None:
    assert decide(autoscaling, workers(3))[0] == {"training": 1}


def test_idle_workers_of_both_kinds_end_and_the_head_stays(autoscaling) -> None:
    long = autoscaling.get_idle_timeout_s() + 1
    assert decide(autoscaling, idle_seconds={"data": long, "training": long})[2] == {"data", "training"}
    assert decide(autoscaling, idle_seconds={"data": 1, "training": 1})[2] == set()
    # Tokenization goes on: the training worker ends all the same.
    assert decide(autoscaling, tasks(1), idle_seconds={"data": long, "training": long})[2] == {"training"}


def test_amazon_takes_every_node_type(sized_aws, monkeypatch, tmp_path) -> None:
    """Ray's provider against moto: security group, key, subnets, then an instance of each type."""
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    image = boto3.client("ec2", region_name=sized_aws["provider"]["region"]).describe_images()["Images"][0]["ImageId"]
    boto3.client("iam").create_instance_profile(InstanceProfileName="there-already")
    cluster = prepare_config(yaml.safe_load(yaml.safe_dump(sized_aws).replace("AMI_ID", image)))
    # Else Ray makes a role, and waits 15 seconds for it.
    cluster["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "there-already"}
    cluster = AWSNodeProvider.bootstrap_config(cluster)
    types = cluster["available_node_types"]
    assert types["training"]["resources"]["GPU"] == 8
    assert "GPU" not in types["data"]["resources"]
    assert types["head"]["resources"] == {"CPU": 0}
    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    for role in ROLES:
        (made,) = provider.create_node(types[role]["node_config"], {"ray-node-type": role}, 1).values()
        assert made.instance_type == types[role]["node_config"]["InstanceType"]
        assert made.image_id == image
    assert len(provider.non_terminated_nodes({})) == len(ROLES)


def test_ray_takes_the_security_group_that_was_made_before_it_and_leaves_its_rules(
    sized_aws, monkeypatch, tmp_path
) -> None:
    """As docs/cluster.md has it made: the nodes' file system lets it in, and ssh is for one address alone."""
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path))
    cluster = prepare_config(deepcopy(sized_aws))
    ec2 = boto3.resource("ec2", region_name=cluster["provider"]["region"])
    (vpc,) = ec2.vpcs.filter(Filters=[{"Name": "is-default", "Values": ["true"]}])
    name = cluster["provider"]["security_group"]["GroupName"]
    assert f"--group-name {name} " in PAGE
    for there in vpc.security_groups.filter(Filters=[{"Name": "group-name", "Values": [name]}]):
        there.delete()
    nodes = vpc.create_security_group(GroupName=name, Description="Ray's nodes")
    nodes.authorize_ingress(IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": nodes.id}]}])
    nodes.authorize_ingress(IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="192.0.2.1/32")
    cluster["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "there-already"}
    types = AWSNodeProvider.bootstrap_config(cluster)["available_node_types"]
    assert all(types[role]["node_config"]["SecurityGroupIds"] == [nodes.id] for role in ROLES)
    nodes.reload()
    assert [each["CidrIp"] for rule in nodes.ip_permissions for each in rule["IpRanges"]] == ["192.0.2.1/32"]
    assert len(nodes.ip_permissions) == 2
