"""What a cluster is, from what its dashboard answers."""

import pytest

from jobs.cluster.dashboard import Dashboard
from jobs.cluster.nodes import free_resources, look_at
from pipelines.workflow.errors import UserError

NODES, USAGE, STATUS = "/api/v0/nodes?limit=10000", "/nodes?view=summary&nocache=1", "/api/cluster_status"


def test_a_cluster_is_its_living_nodes_what_is_free_of_them_and_the_heads_interpreter(serve, ray_pages) -> None:
    head = ray_pages[NODES]["data"]["result"]["result"][0]
    worker = {**head, "node_id": "n2", "is_head_node": False, "resources_total": {"CPU": 4.0}}
    ray_pages[NODES] = {"data": {"result": {"result": [{**worker, "state": "DEAD", "node_id": "n3"}, worker, head]}}}
    usage = {"n1": "1.0/4.0 CPU\n0.0/2.0 GPU\n0B/19.55GiB memory", "n2": "2.0/4.0 CPU"}
    ray_pages[USAGE] = {"data": {"nodeLogicalResources": usage}}
    answers, _ = serve(ray_pages)
    cluster = look_at(Dashboard(answers.address))
    assert cluster.nodes == ({"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0})
    assert cluster.total == {"CPU": 8.0, "GPU": 2.0}
    assert cluster.free == {"CPU": 5.0, "GPU": 2.0}
    assert cluster.python == "/opt/bin/python"
    assert cluster.grows is False


def test_what_is_reserved_is_not_free() -> None:
    gpus = "0.5/4.0 GPU (0.5 used of 3.0 reserved in placement groups)"
    assert free_resources([f"0.0/8.0 CPU\n{gpus}\n0.0/2.0 GPU_of_another_kind", "0B/1.0GiB memory"]) == {
        "CPU": 8.0,
        "GPU": 1.0,
    }


@pytest.mark.parametrize(
    ("label", "reported", "grows"),
    [
        (None, None, False),  # `ray start`, under the second generation of Ray's autoscalers
        (None, "node" + 28 * "A7", False),  # under the first: the type that the dashboard makes of a node's id
        (None, "gpu-worker", True),
        ("data", None, True),
        ("local.cluster.node", None, False),  # the launcher's, for machines that are there
        ("headgroup", None, None),  # KubeRay's, with an autoscaler or without
    ],
)
def test_a_cluster_grows_where_an_autoscaler_gave_its_nodes_types(serve, ray_pages, label, reported, grows) -> None:
    if label:
        ray_pages[NODES]["data"]["result"]["result"][0]["labels"]["ray.io/node-group"] = label
    if reported:
        report = {"autoscalerReport": {"activeNodes": {reported: 1}}}
        ray_pages[STATUS] = {"data": {"clusterStatus": report}}
    answers, _ = serve(ray_pages)
    assert look_at(Dashboard(answers.address)).grows is grows


def test_before_its_first_report_neither_what_is_free_nor_whether_it_grows_is_known(serve, ray_pages) -> None:
    answers, _ = serve({**ray_pages, USAGE: {"data": {"nodeLogicalResources": {}}}})
    cluster = look_at(Dashboard(answers.address))
    assert (cluster.free, cluster.grows) == (None, None)


@pytest.mark.parametrize(
    ("page", "answer", "line"),
    [
        ("/api/version", {"ray_version": "2.9.3"}, "runs Ray 2.9.3, this machine has .*: install the same version"),
        (
            "/api/v0/cluster_metadata",
            {"data": {"pythonVersion": "3.12.1"}},
            "runs Python 3.12.1, this machine has 3.11",
        ),
        ("/api/v0/nodes?limit=10000", {"data": {"result": {"result": []}}}, "has no node yet"),
    ],
)
def test_other_versions_and_a_cluster_without_nodes_are_one_line(serve, ray_pages, page, answer, line) -> None:
    answers, _ = serve({**ray_pages, page: answer})
    with pytest.raises(UserError, match=line):
        look_at(Dashboard(answers.address))


def test_the_last_number_of_pythons_version_may_differ(serve, ray_pages) -> None:
    ray_pages["/api/v0/cluster_metadata"] = {"data": {"pythonVersion": "3.11.99"}}
    answers, _ = serve(ray_pages)
    look_at(Dashboard(answers.address))
