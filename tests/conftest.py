"""Fixtures of all tests. The environment is set before any test imports Ray."""

import pytest
from hypothesis import settings

from pipelines.workflow.environment import prepare_environment

prepare_environment()
settings.register_profile("fot", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("fot")
pytest_plugins = [
    f"fixtures.{name}" for name in ("cluster", "dictionary", "registry", "schedule", "storage", "subjects", "training")
]


@pytest.fixture(scope="session")
def local_ray():
    """A Ray for the whole session."""
    from pipelines.workflow.cluster import ray_cluster

    with ray_cluster():
        yield
