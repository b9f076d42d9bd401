"""Where two runs differ first, and why: a planted difference of each kind is found at its step and named."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.observe.metrics import NON_FINITE
from rayrlhf.observe.samples import Sample, SampleSink, read_samples
from rayrlhf.tools.report.first_difference import difference_lines, first_difference, phase_of
from rayrlhf.tools.report.run_view import read_run
from tests.tools.report.runs import write_run

STEP = 4


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", steps=6)


@pytest.fixture
def twin(original, tmp_path):
    """A copy, for a test to change from step 4 on."""
    return shutil.copytree(original, tmp_path / "two")


def change_metrics(folder, name, value):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [row | ({name: value} if row["step"] >= STEP and "lr" not in row and name in row else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))


def change_samples(folder, **changes):
    rows = read_samples(folder / "samples", STEP)
    fields = set(Sample.__dataclass_fields__) - {"parts", "transcript", "path"}
    samples = [Sample(**{name: row[name] for name in fields if name in row}) for row in rows]
    SampleSink(folder / "samples").write(
        STEP, [Sample(**{**{name: getattr(one, name) for name in fields}, **changes}) for one in samples]
    )


def change_settings(folder, name, **changes):
    path = folder / name
    tree = yaml.safe_load(path.read_text())
    path.write_text(json.dumps(tree | changes) if path.suffix == ".json" else yaml.safe_dump(tree | changes))


def found(original, twin):
    return first_difference(read_run(original), read_run(twin))


def test_a_run_and_its_copy_do_not_differ(original, twin):
    assert found(original, twin) is None
    assert difference_lines(read_run(original), read_run(twin)) == ["no difference in 7 common steps"]


@pytest.mark.parametrize(
    ("changes", "settings", "facts", "phase", "cause"),
    [
        ({"prompt_id": 99}, {"run": {"name": "two", "steps": 6, "seed": 8}}, {}, "prompts", "other seed: run.seed None -> 8"),
        (
            {"prompt": "other"},
            {"data": {"train": {"path": "other"}}},
            {},
            "prompts",
            "other data, template or data order: data",
        ),
        (
            {"response": "other"},
            {},
            {"packages": {"vllm": "0.1"}},
            "responses",
            "other engine version: packages.vllm None -> 0.1",
        ),
        ({"response": "other"}, {"rollout": {"temperature": 0.5}}, {}, "responses", "other sampling settings: rollout.temper"),
        (
            {"response": "other"},
            {"model": {"path": "builtin:tiny", "dtype": "bfloat16"}},
            {},
            "responses",
            "other dtype: model.dt",
        ),
        ({"score": 5.0}, {"reward": {"url": "x"}}, {}, "rewards", "other reward: reward.url None -> x"),
        ({"score": 5.0}, {}, {}, "rewards", "the reward does not give the same text the same score"),
        ({"response": "other"}, {}, {}, "responses", "without run.determinism=exact a response depends on the batch"),
    ],
)
def test_a_sample_that_differs_is_named_with_its_step_phase_and_cause(original, twin, changes, settings, facts, phase, cause):
    change_samples(twin, **changes)
    change_settings(twin, "config.yaml", **settings)
    change_settings(twin, "environment.json", **facts)
    difference = found(original, twin)
    assert (difference.step, difference.phase) == (STEP, phase)
    assert any(cause in line for line in difference.causes), difference.causes
    assert "sample 0 of prompt 0" in difference.what


@pytest.mark.parametrize(
    ("metric", "settings", "phase", "cause"),
    [
        (
            "policy/grad_norm",
            {"train": {"learning_rate": 1.0}},
            "update",
            "other optimizer or mini-batches: train.learning_rate",
        ),
        (
            "policy/grad_norm",
            {"train": {"micro_batch_tokens": 9}},
            "update",
            "other micro-batch split or number of ranks: train",
        ),
        (
            "objective/kl",
            {"algorithm": {"kl": {"coefficient": 0.2}}},
            "experience",
            "other algorithm: algorithm.kl.coefficient",
        ),
        ("evaluation/score", {}, "evaluation", "no setting, version or machine differs, and the runs agree up to step 5"),
        ("sync/version", {}, "weight sync", "no setting, version or machine differs, and the runs agree up to step 3"),
    ],
)
def test_a_metric_that_differs_is_named_with_its_phase_and_cause(original, twin, metric, settings, phase, cause):
    change_metrics(twin, metric, 0.123)
    change_settings(twin, "config.yaml", **settings)
    difference = found(original, twin)
    assert difference.phase == phase
    assert difference.what.startswith(f"{metric} is ")
    assert any(cause in line for line in difference.causes), difference.causes


def test_weights_that_did_not_arrive_come_first(original, twin):
    change_samples(twin, response="other")
    change_metrics(twin, LOGPROB_GAP, 0.4)
    difference = found(original, twin)
    assert "weights not arrived in" in difference.causes[0]
    assert "differ by 0.4 nats at step 4, those of the other run by 1e-06" in difference.causes[0]


def test_an_earlier_phase_of_a_step_counts_before_a_later_one(original, twin):
    change_metrics(twin, "policy/grad_norm", 7.0)
    change_samples(twin, score=5.0)
    assert found(original, twin).phase == "rewards"


def test_a_number_that_is_not_finite_in_one_run_is_a_difference(original, twin):
    path = twin / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [
        row | ({"objective/kl": None, NON_FINITE: 1} if row["step"] == STEP and "objective/kl" in row else {}) for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    difference = found(original, twin)
    assert (difference.step, difference.phase) == (STEP, "update")
    assert "objective/kl is not finite in one run" in difference.what


def test_rounding_is_told_apart_from_a_large_difference(original, twin):
    first = read_run(original).series["objective/kl"].values[STEP - 1]
    change_metrics(twin, "objective/kl", first * (1 + 1e-6))
    lines = difference_lines(read_run(original), read_run(twin))
    assert lines[0].startswith("first difference: step 4, experience: objective/kl is ")
    assert "(relative 1e-06)" in lines[0]
    assert any(line.startswith("first difference above 1%: step 5, experience") for line in lines)


@pytest.mark.parametrize(
    ("metric", "phase"),
    [
        ("time/step", None), ("memory/peak_gib", None), ("tokens/responses_len_mean", "responses"), ("val/ratio", "update"),
        ("objective/scores", "rewards"), ("objective/kl", "experience"), ("loss/policy_avg", "update"),
        ("ledger/issued", "prompts"), ("ledger/trained", "responses"), ("weight_sync/update_arrived", "weight sync"),
        ("sampling/tokens", "responses"), ("sampling/prompts_left_out", "rewards"),
    ],
)  # fmt: skip
def test_a_metric_belongs_to_the_phase_that_shows_in_it_first(metric, phase):
    assert phase_of(metric) == phase


def test_the_command_ends_with_1_for_runs_that_differ_and_its_page_has_the_difference(original, twin):
    result = CliRunner().invoke(app, ["compare", str(original), str(twin), "--output", str(twin / "both.html")])
    assert (result.exit_code, result.output.splitlines()[0]) == (0, "no difference in 7 common steps")
    change_samples(twin, response="other")
    result = CliRunner().invoke(app, ["compare", str(original), str(twin), "--output", str(twin / "both.html")])
    assert result.exit_code == 1
    assert result.output.startswith(
        "first difference: step 4, responses: sample 0 of prompt 0: response 'answer 4' and 'other'"
    )
    page = (twin / "both.html").read_text()
    assert "First difference" in page
    assert "step 4, responses" in page
