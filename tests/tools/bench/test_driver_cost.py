"""The driver's cost, measured on a small step; what is asserted is that the step is whole, not how long it took."""

import json

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.tools.bench.driver_cost import MAKING


@pytest.mark.slow
def test_the_driver_takes_a_whole_step_with_simulated_replicas(tmp_path):
    arguments = ["bench", "driver", "--samples", "60", "--samples", "120", "--replicas", "6", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    small, large = json.loads((tmp_path / "driver.json").read_text())
    assert (small["samples"], large["samples"]) == (60, 120)
    assert small["seconds"] > 0
    assert {"generate", "reward", "reference", "critic", "assemble", "weight_sync", MAKING} <= set(small["phases"])
    assert "120 samples on 6 replicas" in result.output
