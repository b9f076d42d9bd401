"""200,000 rows stay below 6 GiB over all processes, with one index for all of them (by hand: `-m nightly -s`)."""

import json
import random
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayrlhf.config.icl import ICLBuildConfig, ICLPackConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.observe.memory import PeakMemory
from rayrlhf.pipelines.icl.build_dataset import build_dataset
from rayrlhf.pipelines.icl.pack_documents import pack_documents

ROWS = 200_000
MOST_GIB = 6.0


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("selection", ["random", "bm25"])
def test_200_000_rows_stay_below_6_gib(tmp_path: Path, selection: str, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    words = [f"w{number}" for number in range(5000)]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(ROWS):
            file.write(json.dumps({"prompt": " ".join(draw.choices(words, k=12)), "completion": f"a{number % 50}"}) + "\n")
    settings = [
        "model.path=builtin:tiny?layers=1&hidden=64",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"run.root={tmp_path / 'runs'}",
        f"demonstrations.selection={selection}",
        "demonstrations.most=2",
    ]
    start = time.monotonic()
    with PeakMemory() as memory:
        result = build_dataset(load_config(ICLBuildConfig, None, settings))
    seconds = time.monotonic() - start
    gib = memory.peak_bytes / 2**30
    with capsys.disabled():
        print(f"\n{selection}: {ROWS:,} rows in {seconds:.0f} s, at most {gib:.2f} GiB in all processes together")
    assert pq.read_metadata(result.dataset).num_rows == ROWS
    assert gib < MOST_GIB


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("by", ["bm25", "nearest"])
def test_200_000_documents_stay_below_6_gib(tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    words = [f"w{number}" for number in range(5000)]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for _ in range(ROWS):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=24))}) + "\n")
    encoder = ["neighbors.encoder=builtin:tiny?layers=1&hidden=64", "neighbors.pooling=mean"] if by == "nearest" else []
    settings = [
        "model.path=builtin:tiny?layers=1&hidden=64",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"run.root={tmp_path / 'runs'}",
        f"neighbors.by={by}",
        *encoder,
    ]
    start = time.monotonic()
    with PeakMemory() as memory:
        result = pack_documents(load_config(ICLPackConfig, None, settings))
    seconds = time.monotonic() - start
    gib = memory.peak_bytes / 2**30
    with capsys.disabled():
        print(f"\n{by}: {ROWS:,} documents in {seconds:.0f} s, at most {gib:.2f} GiB in all processes together")
    assert result.report["documents"] == ROWS
    assert gib < MOST_GIB
