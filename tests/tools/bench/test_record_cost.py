"""Cost of the records of a run, from what the run measured of itself."""

import re

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.observe.flight_record import FOLDER
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.tools.bench.record_cost import record_cost
from tests.ppo.records import recorded_run


def test_waiting_and_writing_are_shares_of_all_steps_but_the_first_and_bytes_are_of_sampled_tokens(tmp_path):
    config, step = recorded_run(tmp_path)
    sink = MetricsSink(config.run.folder)
    for number, (seconds, record, checksums, thread) in enumerate(
        [(100.0, 50.0, 50.0, 50.0), (2.0, 0.01, 0.02, 0.04), (3.0, 0.01, 0.0, 0.06)], start=2
    ):
        times = {"time/step": seconds, "time/record": record, "time/record/thread": thread}
        sink.write(number, times | ({"time/checksums": checksums} if checksums else {}))
    sink.close()
    cost = record_cost(config.run.folder, "full")
    tokens = sum(len(rollout.response_ids) for rollout in step.scored.rollouts)
    (file,) = (config.run.folder / FOLDER).iterdir()
    assert (cost.seconds, cost.waiting, cost.writing) == pytest.approx((2.5, 0.04 / 5, 0.1 / 5))
    assert cost.token_bytes == pytest.approx(len(file.read_bytes()) / tokens)
    assert cost.line().startswith("observe.record=full: at most 2.80% of a step of 2.50 s (0.80% waiting, 2.00% in a thread), ")


@pytest.mark.nightly
def test_the_command_tells_the_cost_of_each_level():
    words = "bench record --model builtin:tiny?layers=1&hidden=64 --prompts 8 --updates 2"
    found = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    for level in ("light", "full"):
        assert re.search(
            rf"observe.record={level}: at most \S+% of a step of \S+ s .*, \d+ bytes per sampled token", found.output
        )
