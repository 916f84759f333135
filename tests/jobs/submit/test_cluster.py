"""What a cluster is, from what its dashboard answers."""

import pytest

from jobs.submit.cluster import grows, look_at
from jobs.submit.dashboard import Dashboard
from pipelines.errors import UserError

OURS = "node_" + 28 * "a7"
REPORT = {
    "autoscalerReport": {"activeNodes": {OURS: 1}},
    "loadMetricsReport": {"usage": {"CPU": [3.0, 8.0], "memory": [0.0, 1.0]}},
}


def test_a_cluster_is_its_living_nodes_what_is_free_of_them_and_the_heads_interpreter(serve, ray_pages) -> None:
    head = ray_pages["/api/v0/nodes?limit=10000"]["data"]["result"]["result"][0]
    worker = {"node_id": "n2", "state": "ALIVE", "is_head_node": False, "resources_total": {"CPU": 4.0}}
    ray_pages["/api/v0/nodes?limit=10000"] = {
        "data": {"result": {"result": [{**worker, "state": "DEAD", "node_id": "n3"}, worker, head]}}
    }
    ray_pages["/api/cluster_status"] = {"data": {"clusterStatus": REPORT}}
    answers, _ = serve(ray_pages)
    cluster = look_at(Dashboard(answers.address))
    assert cluster.nodes == ({"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0})
    assert cluster.total == {"CPU": 8.0, "GPU": 2.0}
    assert cluster.free == {"CPU": 5.0, "GPU": 2.0}
    assert cluster.python == "/opt/bin/python"
    assert not cluster.grows


def test_a_cluster_grows_where_an_autoscaler_names_its_nodes_or_has_not_said_yet() -> None:
    assert not grows(REPORT)
    assert not grows({"autoscalerReport": {"activeNodes": {"node" + 28 * "A7": 1}}})  # as the dashboard spells it
    assert grows({"autoscalerReport": {"activeNodes": {"ray.head.default": 1}}})
    assert grows({"autoscalerReport": {"activeNodes": {OURS: 1, "gpu-worker": 2}}})
    assert grows({})


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
    assert look_at(Dashboard(answers.address)).python_version == "3.11.99"
