"""A cluster that stays when its drivers go."""

import pytest

from tests.chaos.arena import StandingCluster


@pytest.fixture
def cluster():
    standing = StandingCluster()
    yield standing
    standing.end()
