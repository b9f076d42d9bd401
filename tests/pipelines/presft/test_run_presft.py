"""A whole run with real tuning: four stages, two rounds, nothing done twice."""

import json

import pyarrow.parquet as pq
import pytest

from rayrlhf.pipelines.presft.run_presft import run_presft
from tests.pipelines.presft.runs import presft_config, write_pairs

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("small_ray")]


def test_two_rounds_tune_repair_and_measure_and_a_second_start_does_nothing(tmp_path):
    held_out = write_pairs(tmp_path / "held_out.jsonl", 8)
    config = presft_config(
        tmp_path,
        "run.rounds=2",
        "select.rule=quantile",
        "select.value=0.25",
        "train.epochs=1",
        "train.batch_size=16",
        "checkpoint.every=0",
        f"quality.data.path={held_out}",
        "quality.verifier.functions=[{name: tests.pipelines.presft.runs:digit_share}]",
        count=32,
    )
    result = run_presft(config)
    folder = config.run.folder
    assert result.export == folder / "round-2" / "tuned" / "export"
    assert (result.export / "config.json").is_file()
    assert [facts["model"] for facts in result.datasheet["quality"]] == ["tuned", "round-1/tuned", "round-2/tuned"]
    assert all(0 <= facts["score"] <= 1 and facts["rows"] == 8 for facts in result.datasheet["quality"])
    assert set(result.datasheet["losses"]) == {"tuned", "round-1/tuned", "round-2/tuned"}
    first, second = result.datasheet["rounds"]
    assert first["struggling"] == second["struggling"] == 8
    assert second["model"] == "round-1/tuned"
    one, two = (pq.read_table(folder / f"round-{number}" / "dataset.parquet").to_pylist() for number in (1, 2))
    assert [row["source"] for row in one] == [row["source"] for row in two] == list(range(1, 33))
    rows = pq.read_table(folder / "round-2" / "scores" / "part-000000.parquet").to_pylist()
    assert [row["response"] for row in rows] == [row["completion"] for row in one[:16]]
    assert "Loss and quality before and after" in (folder / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert run_presft(config).datasheet == json.loads((folder / "datasheet.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before
