"""One small Ray for all tests of the streaming stages."""

import pytest
import ray


@pytest.fixture(scope="package")
def small_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=300 * 2**20)
    yield
    ray.shutdown()
