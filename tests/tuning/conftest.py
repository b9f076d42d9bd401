"""One local Ray for all runs of a module; workers start in it much faster than a cluster does."""

import pytest


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
