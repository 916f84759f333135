import ipaddress

import psutil
import pytest
import ray

from pipelines.cluster import check_workers
from pipelines.errors import UserError


def test_a_ray_of_our_own_listens_on_loopback_only(local_ray) -> None:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    here = psutil.Process()
    listening = {
        connection.laddr.ip
        for process in [here, *here.children(recursive=True)]
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    for address in map(ipaddress.ip_address, listening):
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, address


def test_too_many_workers_are_a_users_error_with_the_number_that_fits(local_ray) -> None:
    there = int(ray.cluster_resources()["CPU"])
    check_workers(there, 1, 0)
    with pytest.raises(UserError, match=rf"Ray has {there}: .*resources.workers={there}\b"):
        check_workers(there + 1, 1, 0)
    with pytest.raises(UserError, match=r"1 GPU each need 1000, Ray has 0"):
        check_workers(1000, 0, 1)
