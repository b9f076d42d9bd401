"""The example's configurations load, and its data is what its description says."""

import json
import runpy
from pathlib import Path

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig

EXAMPLE = Path(__file__).parents[3] / "examples" / "presft"


@pytest.mark.parametrize("path", sorted(EXAMPLE.glob("*.yaml")), ids=lambda path: path.name)
def test_a_configuration_loads(path):
    assert load_config(PreSFTConfig, path, []).run.rounds == 1


def test_a_fifth_of_the_responses_is_wrong_half_of_them_alike_and_no_prompt_is_held_out_and_trained_on(tmp_path):
    functions = runpy.run_path(str(EXAMPLE / "make_data.py"))
    functions["make"](tmp_path, 4000, 0)
    noisy, clean, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("noisy", "clean", "held_out")
    )
    assert len(held_out) == 2000
    assert len({row["prompt"] for row in noisy + held_out}) == 6000
    wrong = [row for row in noisy if row["completion"] != row["answer"]]
    assert [row["mistake"] != "none" for row in noisy] == [row["completion"] != row["answer"] for row in noisy]
    assert 0.18 < len(wrong) / 4000 < 0.22
    assert 0.4 < sum(row["mistake"] == "systematic" for row in wrong) / len(wrong) < 0.6
    assert all(row["completion"] == row["answer"] for row in clean + held_out)
    for row in held_out[:50]:
        numbers = [int(number) for number in row["prompt"].rstrip("=").split()]
        assert row["answer"] == " ".join(str((number + 3) % 10) for number in numbers)
    assert functions["right"]([" 8 9\n", "8"], ["8 9", "9"]) == [1.0, 0.0]
