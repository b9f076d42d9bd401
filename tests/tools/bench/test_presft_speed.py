"""The synthetic rows are what they claim to be, and a steady speed leaves the start out."""

import pytest

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.probing import given_probes
from rayrlhf.tools.bench.bench_commands import bench_presft_command
from rayrlhf.tools.bench.presft_speed import SteadySpeed, synthetic_pairs, write_rows


def test_synthetic_pairs_are_alike_but_not_equal_and_come_back_from_their_part_files(tmp_path):
    write_rows(PartFolder(tmp_path), 50, rows_per_part=20)
    tables = [given_probes(table) for table in PartFolder(tmp_path).tables()]
    assert [table.num_rows for table in tables] == [20, 20, 10]
    stored = [(row["probes"][0], row["response"]) for table in tables for row in table.to_pylist()]
    assert stored == list(synthetic_pairs(50))
    scores = [BleuScorer().score(*pair) for pair in stored]
    assert 20 < sum(scores) / len(scores) < 80


def test_a_speed_counts_from_the_first_report(monkeypatch):
    times = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("rayrlhf.tools.bench.presft_speed.time.perf_counter", lambda: next(times))
    speed = SteadySpeed()
    for rows in (1000, 30, 50):
        speed.done(rows)
    assert speed.value == 20.0


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="expected scoring, generation, memory"):
        bench_presft_command("speed", rounds=1)
