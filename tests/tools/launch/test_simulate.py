"""The simulated step against what can be worked out by hand, and what must hold whatever is drawn."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.launch import SimulationConfig
from rayrlhf.tools.launch.simulate import simulate


def config(**sections):
    given_ = {"lengths": {"median": 100, "spread": 0}, "rates": {"token_seconds": 0.1, "sync_seconds": 2, "prompt_tokens": 0}}
    for name, value in sections.items():
        given_[name] = given_.get(name, {}) | value if isinstance(value, dict) else value
    return SimulationConfig.model_validate(given_)


def run(settings_, samples=64, replicas=2, places=16, longest=1000):
    return simulate(settings_, samples=samples, replicas=replicas, places=places, longest=longest)


def training_seconds(settings_, samples, tokens=100):
    rates = settings_.rates
    return samples * tokens * (1 / rates.score_tokens + 1 / rates.update_tokens)


@pytest.mark.parametrize(("samples", "replicas", "places"), [(64, 2, 16), (65, 2, 16), (10, 3, 8), (256, 4, 64)])
def test_without_staleness_a_step_is_waves_of_sampling_then_training_then_the_sync(samples, replicas, places):
    settings_ = config()
    report = run(settings_, samples, replicas, places)
    waves = math.ceil(samples / (replicas * places))
    training = training_seconds(settings_, samples)
    assert report.step_seconds == pytest.approx(waves * 10 + training + 2)
    assert report.trainer_idle == pytest.approx(waves * 10 / report.step_seconds)
    assert report.replica_idle == pytest.approx(1 - samples * 10 / (report.step_seconds * replicas * places))
    assert report.samples_per_hour == pytest.approx(samples * 3600 / report.step_seconds)
    assert report.oldest == 0


def test_with_staleness_the_slower_side_alone_sets_the_pace():
    slow_training = config(max_staleness=1, steps=30, rates={"update_tokens": 100.0})
    report = run(slow_training)
    assert report.step_seconds == pytest.approx(training_seconds(slow_training, 64) + 2, rel=0.02)
    assert report.trainer_idle < 0.01
    slow_sampling = config(max_staleness=1, steps=30, rates={"token_seconds": 1.0, "sync_seconds": 0})
    report = run(slow_sampling)
    assert report.step_seconds == pytest.approx(200, rel=0.02)
    assert report.replica_idle < 0.02


@settings(max_examples=60, deadline=None)
@given(
    staleness=st.integers(0, 3),
    samples=st.integers(1, 60),
    replicas=st.integers(1, 5),
    places=st.integers(1, 20),
    spread=st.floats(0, 1.5),
    hours=st.sampled_from([None, 0.05, 0.5]),
    seed=st.integers(0, 5),
)
def test_no_response_is_older_than_allowed_and_all_are_trained_on_with_any_failures(
    staleness, samples, replicas, places, spread, hours, seed
):
    settings_ = config(
        max_staleness=staleness,
        steps=5,
        seed=seed,
        lengths={"spread": spread},
        failures={"hours_between": hours, "rebuild_seconds": 30},
    )
    report = run(settings_, samples, replicas, places, longest=400)
    assert 0 <= report.oldest <= staleness
    assert 0 <= report.staleness <= report.oldest
    assert -1e-9 <= report.trainer_idle <= 1
    assert -1e-9 <= report.replica_idle <= 1
    assert report.samples_per_hour == pytest.approx(samples * 3600 / report.step_seconds)
    assert report == run(settings_, samples, replicas, places, longest=400)
    if hours is None:
        assert report.failures == report.lost == 0


def test_failures_cost_time_and_their_responses_are_sampled_again():
    healthy = run(config(steps=10))
    failing = run(config(steps=10, failures={"hours_between": 0.02, "rebuild_seconds": 20}))
    assert failing.failures > 0
    assert failing.lost > 0
    assert failing.step_seconds > healthy.step_seconds


def test_a_long_tail_leaves_places_idle_that_staleness_fills():
    tail = {"median": 100, "spread": 1.2}
    waiting = run(config(steps=20, lengths=tail))
    flowing = run(config(steps=20, lengths=tail, max_staleness=2))
    assert flowing.replica_idle < waiting.replica_idle - 0.1
    assert flowing.samples_per_hour > 1.3 * waiting.samples_per_hour


@pytest.mark.parametrize(
    ("rates", "overrides", "oldest"),
    [("max_staleness: 1", [], 1), ("", ["async.max_staleness=2"], 2), ("max_staleness: 0", ["async.max_staleness=2"], 0)],
)
def test_plan_prints_the_simulation_of_a_run_with_the_staleness_it_has(tmp_path, rates, overrides, oldest):
    (tmp_path / "rates.yaml").write_text(f"{rates}\nrates: {{token_seconds: 0.01, update_tokens: 2000}}\n")
    (tmp_path / "run.yaml").write_text(
        "model: {path: 'builtin:tiny'}\ndata: {train: {path: x}}\nreward: {functions: [{name: gsm8k}]}\n"
    )
    command = ["plan", str(tmp_path / "run.yaml"), *overrides, "--simulate", str(tmp_path / "rates.yaml")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "responses per hour" in result.output
    assert f"{oldest} at most" in result.output
