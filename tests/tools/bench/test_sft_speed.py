"""What `rayrlhf bench sft` feeds both trainers, and one whole comparison."""

import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.data.batching import micro_batches
from rayrlhf.errors import UserError
from rayrlhf.tools.bench.bench_commands import bench_sft_command
from rayrlhf.tools.bench.paired import in_new_process
from rayrlhf.tools.bench.sft_speed import BATCH, MAX_LENGTH, PADDED_TOKENS, _StepClock, texts


def test_texts_have_the_lengths_of_gsm8k_and_none_is_too_long():
    lengths = np.array([len(text) for text in texts(300)])
    assert 450 < np.median(lengths) < 530
    assert lengths.max() < MAX_LENGTH
    assert np.percentile(lengths, 90) > 1.5 * np.median(lengths)
    assert texts(5) == texts(5)


def test_our_padded_micro_batches_have_the_padding_that_is_stated():
    lengths = [len(text) + 1 for text in texts(40 * BATCH)]

    steps = [lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    batches = [[step[index] for index in batch] for step in steps for batch in micro_batches(step, PADDED_TOKENS)]
    assert sum(lengths) / sum(len(batch) * max(batch) for batch in batches) == pytest.approx(0.99, abs=0.005)
    assert sum(lengths) / sum(BATCH * max(step) for step in steps) == pytest.approx(0.6, abs=0.01)


def test_the_first_step_and_batches_collated_ahead_are_not_counted(monkeypatch):
    clock = _StepClock()
    collate = clock.counting(lambda examples: len(examples))
    callback = clock.callback()
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    for tokens in (1000, 30, 50, 7000):
        assert collate([{"input_ids": [0] * tokens}]) == 1
    for _ in range(3):
        callback.on_step_end()
    assert clock.tokens_per_second(2) == 80 / 4.0


def failing():
    raise UserError("no such thing")


def test_a_run_in_a_process_of_its_own_returns_its_speed_and_raises_its_errors():
    assert in_new_process(float, 3) == 3.0
    with pytest.raises(UserError, match="no such thing"):
        in_new_process(failing)


def test_an_unknown_precision_is_one_line():
    with pytest.raises(UserError, match="--precision float8: expected float32 or bfloat16"):
        bench_sft_command(["float8"], rounds=1, steps=1)


@pytest.mark.nightly
def test_the_command_measures_both_trainers_and_writes_what_it_found(tmp_path):
    arguments = ["bench", "sft", "--precision", "float32", "--no-packing", "--rounds", "1", "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    (found,) = json.loads((tmp_path / "sft.json").read_text())
    assert all(speeds[0] > 0 for speeds in found["speeds"].values())
    assert (tmp_path / "sft.md").read_text().startswith("**SFT of builtin:tiny, float32, packing off")
