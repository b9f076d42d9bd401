"""What `rayrlhf bench prefix` measures, and one whole comparison."""

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.data.prefix_tree import in_prefix_order
from rayrlhf.errors import UserError
from rayrlhf.tools.bench import prefix_speed
from rayrlhf.tools.bench.bench_commands import bench_prefix_command


@pytest.mark.parametrize(
    ("case", "tokens", "distinct"),
    [("group", 3200, 1800), ("long-prompt", 10240, 2560), ("demonstrations", 8512, 1512), ("pairs", 3200, 2240),
     ("agent", 4320, 960), ("none", 1600, 1600)],
)  # fmt: skip
def test_cases_have_the_stated_tokens(case, tokens, distinct):
    order = in_prefix_order([sequence.token_ids for sequence in prefix_speed.case_sequences(case)])
    assert (order.tokens, sum(order.distinct) - sum(order.shared)) == (tokens, pytest.approx(distinct, abs=8))
    assert order.pays == (case != "none")


def test_an_unknown_case_is_one_line():
    with pytest.raises(UserError, match="--case other: expected group, long-prompt, demonstrations, pairs, agent, none, step"):
        bench_prefix_command(case=["other"], rounds=1)


@pytest.mark.slow
def test_the_tiny_model_is_measured_in_update_and_scoring(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_speed, "CASES", {"group": [(40, 8, 4)], "pairs": [(20, 8, 2)] * 2})
    cases = ["--case", "group", "--case", "pairs", "--micro-batch-tokens", "256"]
    arguments = ["bench", "prefix", *cases, "--model", "builtin:tiny", "--precision", "float32", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    text = (tmp_path / "prefix.md").read_text()
    titles = [line.split(",")[0] for line in text.splitlines() if line.startswith("**")]
    assert titles == ["**update", "**memory of the update", "**scoring"] * 2


@pytest.mark.nightly
def test_whole_steps_run_with_and_without_sharing(monkeypatch):
    monkeypatch.setattr(prefix_speed, "STEP_PROMPTS", 2)
    found = prefix_speed.bench_step("builtin:tiny?layers=1&hidden=64", precision="float32", rounds=1)
    assert list(found.speeds) == ["off", "auto"]
    assert min(map(min, found.speeds.values())) > 0
