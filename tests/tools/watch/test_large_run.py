"""The page of a run of 5,000 steps with 200,000 rollouts is small and answers at once (by hand: `-m nightly -s`)."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayrlhf.observe.samples import SampleSink
from rayrlhf.observe.trace import TraceWriter
from rayrlhf.tools.report.run_page import write_run_report
from tests.tools.report.runs import PHASES, START, config, metrics, sample

STEPS, ROLLOUTS, MORE_METRICS = 5_000, 40, 60
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written as the sinks do, but for their fsyncs: a file of 40 rollouts a step, a trace, as many metrics as real runs."""
    folder, chance = tmp_path_factory.mktemp("large") / "run", random.Random(0)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config("large", STEPS)))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            more = {f"more/metric_{number}": chance.random() for number in range(MORE_METRICS)}
            file.write(json.dumps({"step": step} | metrics(step, STEPS, chance) | more) + "\n")
    words = [f"word{number} " for number in range(2000)]
    rows = []
    for number in range(ROLLOUTS):
        tokens = chance.choices(words, k=150)
        kl = [chance.gauss(0, 0.4) for _ in tokens]
        changes = {
            "prompt": "".join(chance.choices(words, k=60)),
            "response": "".join(tokens),
            "tokens": tokens,
            "token_kl": kl,
        }
        rows.append(sample(1, number, chance, **changes))
    first = SampleSink(folder / "samples").write(1, rows)
    table = pq.read_table(first)
    for step in range(2, STEPS + 1):
        steps = pa.array([step] * ROLLOUTS, pa.int64())
        pq.write_table(table.set_column(0, "step", steps), folder / "samples" / f"step-{step:06d}.parquet")
    trace, now = TraceWriter(folder), START
    for step in range(1, STEPS + 1):
        for phase, seconds in PHASES.items():
            trace.span(phase, "driver", now, seconds, arguments={"step": step})
            now += seconds
    trace.close()
    return folder


@pytest.mark.nightly
def test_the_page_of_a_large_run_is_small_states_its_sample_and_answers_within_three_seconds(large_run: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    begun = time.monotonic()
    page_file = write_run_report(large_run)
    written = time.monotonic() - begun
    size = page_file.stat().st_size
    assert size < 15e6
    assert "600 of the 200,000 rollouts in the run folder" in page_file.read_text(encoding="utf-8")
    seconds = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            begun = time.monotonic()
            page.goto(page_file.as_uri())
            page.locator(".plot .main-svg").first.wait_for()
            section = page.locator("section", has=page.get_by_role("heading", name="Sampled rollouts"))
            section.get_by_role("searchbox").fill("word7 ")
            section.locator("output", has_text="of 600 rows").wait_for()
            seconds.append(time.monotonic() - begun)
            page.close()
        browser.close()
    seconds.sort()
    took = f"written in {written:.1f} s; interactive in {seconds[0]:.2f} to {seconds[-1]:.2f} s (5 openings)"
    print(f"\n{size / 1e6:.1f} MB, {took}")
    assert seconds[2] < 3, "the median: charts drawn, the table of rollouts filtered"
