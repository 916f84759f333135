import pytest

from pipelines.cluster import check_workers
from pipelines.errors import UserError


def test_workers_that_do_not_fit_are_refused_with_the_number_that_does(local_ray):
    import ray

    there = int(ray.cluster_resources()["CPU"])
    check_workers(there, cpus=1, gpus=0)
    with pytest.raises(UserError, match=rf"Ray has {there}: lower .*--set resources\.workers={there}\)"):
        check_workers(there + 1, cpus=1, gpus=0)
    with pytest.raises(UserError, match="1 workers with 1000 GPU each need 1000"):
        check_workers(1, cpus=1, gpus=1000)
