"""A recorded step is executed again and compared: without models here, on a run's models in the slow tests."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.errors import UserError
from rayrlhf.observe.flight_record import FOLDER, read_record
from rayrlhf.ppo.executed_step import recorded_rollouts, sampled_again, to_record
from rayrlhf.ppo.flight_recorder import FlightRecorder
from rayrlhf.ppo.replay import replay_step
from rayrlhf.ppo.step_comparison import compare_samples, compare_update
from tests.ppo.records import executed, made_up, recorded_run, rewrite, rollout


def first(config, phase="experience"):
    found = replay_step(config.run.folder, 1, phase).first_difference
    return found and (found.phase, found.item, found.where)


def edit(config, **keys):
    """Replace settings in a run's stored configuration."""
    path = config.run.folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        section, _, name = key.partition("__")
        (tree[section] if name else tree)[name or section] = value
    path.write_text(yaml.safe_dump(tree))


def at(row, change):
    """A function of a column that changes one row of it."""
    return lambda column: [change(np.array(one)) if index == row else one for index, one in enumerate(column)]


def put(token, value):
    def change(row):
        row = np.array(row)
        row[token] = value
        return row

    return change


def same(one, other):
    return all(
        (left is None and right is None) or (left is not None and np.asarray(left).tobytes() == np.asarray(right).tobytes())
        for left, right in zip(one, other, strict=True)
    )


def test_every_field_of_a_rollout_that_is_learned_from_comes_back_from_its_record(tmp_path):
    scored = made_up()
    random = np.random.default_rng(1)
    played = rollout(
        random,
        99,
        1 << 20,
        3,
        rewards=np.array([0.0, 1.0, 0.5], np.float32),
        path="planner",
        constrained=np.array([True, False, False]),
        read_tokens=9,
        cached_tokens=4,
    )
    played = replace(played, action_mask=np.array([True, False, True]), versions=np.array([0, 1, 2], np.int32), text="")
    scored = replace(
        scored,
        rollouts=(*scored.rollouts, played),
        rewards=replace(
            scored.rewards,
            scores=np.append(scored.rewards.scores, np.float32(2)),
            parts={"length": np.append(scored.rewards.parts["length"], np.float32("nan"))},
            tokens=[None] * 16 + [np.array([0.0, 2.0, 0.0], np.float32)],
        ),
        forward_passes={name: [*rows, rows[0]] for name, rows in scored.forward_passes.items()},
    )
    _config, step = recorded_run(tmp_path)
    greedy = replace(made_up(samples=2), forward_passes={})
    no_arrays = SimpleNamespace(batch=SimpleNamespace(arrays={}))
    whole = replace(step, scored=replace(scored, greedy=greedy), experience=no_arrays)
    again = recorded_rollouts(to_record(whole, "light"))
    for one, other in zip(scored.rollouts, again.rollouts, strict=True):
        for name in ("key", "prompt_ids", "response_ids", "action_mask", "logprobs", "versions", "finish_reason", "seed"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        for name in ("rewards", "constrained", "path", "read_tokens", "cached_tokens"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert same([scored.rewards.scores, *scored.rewards.parts.values()], [again.rewards.scores, *again.rewards.parts.values()])
    assert same(scored.rewards.tokens, again.rewards.tokens)
    for name, rows in scored.forward_passes.items():
        assert same([row.logprobs for row in rows], [row.logprobs for row in again.forward_passes[name]])
        assert same([row.values for row in rows], [row.values for row in again.forward_passes[name]])
    assert [one.key for one in again.greedy.rollouts] == [one.key for one in greedy.rollouts]
    assert same(greedy.rewards.scores, again.greedy.rewards.scores)


@pytest.mark.parametrize("level", ["light", "full"])
def test_experience_made_again_equals_its_record_bit_for_bit(tmp_path, level):
    config, _ = recorded_run(tmp_path, level=level)
    outcome = replay_step(config.run.folder, 1, "experience")
    assert {one.verdict for one in outcome.compared} == {"equal bit for bit"}
    assert {"advantages", "returns", "action_mask", "value_mask"} <= {one.item for one in outcome.compared}
    assert ("samples of the optimizer steps" in {one.item for one in outcome.compared}) == (level == "full")
    assert outcome.lines()[-1] == "step 1: equals its record bit for bit"


def test_a_light_record_takes_at_most_40_bytes_a_token(tmp_path):
    config, step = recorded_run(
        tmp_path, "rollout.max_new_tokens=64", "rollout.max_model_length=128", level="light", scored=made_up(64, 64)
    )
    (path,) = (config.run.folder / FOLDER).iterdir()
    tokens = sum(len(one.response_ids) for one in step.scored.rollouts)
    assert path.stat().st_size / tokens < 40


FAULTS = {
    "wrong mask": ({"action_mask": at(3, put(0, False))}, ("record", "action mask", "row 3 (prompt 1, sample 1), token 0")),
    "shifted log-probs": (
        {"score__policy__logprobs": at(5, lambda row: np.roll(row, 1) - np.float32(0.5))},
        ("experience", "advantages", ""),
    ),
    "swapped rewards": (
        {"score": lambda scores: np.roll(scores, 1)},
        ("record", "scores as sums of their parts", ""),
    ),
    "doubled sample": ({"sample": put(1, 0)}, ("record", "sampling seeds", "row 1 (prompt 0, sample 0)")),
    "a value of the critic": (
        {"score__critic__values": at(2, put(0, 9.0))},
        ("experience", "advantages", ""),
    ),
    "NaN": ({"experience__returns": at(4, put(0, np.nan))}, ("experience", "returns", "row 4 (prompt 2, sample 0), token 0")),
    "an advantage": (
        {"experience__advantages": at(7, lambda row: row + np.float32(0.01))},
        ("experience", "advantages", "row 7 (prompt 3, sample 1), token 0"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_its_first_place(tmp_path, fault):
    columns, (phase, item, place) = FAULTS[fault]
    config, _ = recorded_run(tmp_path)
    rewrite(config, **{name: (lambda column, change=change: change(column)) for name, change in columns.items()})
    found = first(config)
    assert found[:2] == (phase, item)
    assert f"first at {place}" in found[2]


def test_rewards_and_parts_swapped_together_are_found_in_the_advantages(tmp_path):
    config, _ = recorded_run(tmp_path)

    def swap(scores):
        order = np.argsort(scores)
        swapped = scores.copy()
        swapped[order[[0, -1]]] = scores[order[[-1, 0]]]
        return swapped

    rewrite(config, score=swap, reward__length=swap)
    assert first(config)[:2] == ("experience", "advantages")


def test_reordered_optimizer_steps_and_another_seed_are_found(tmp_path):
    config, _step = recorded_run(tmp_path)
    plan = read_record(config.run.folder / FOLDER, 1).header["plan"]
    rewrite(config, header={"plan": [plan[0], plan[1][::-1]]})
    assert first(config)[:2] == ("experience", "samples of the optimizer steps")
    assert "first at epoch 2, optimizer step 1" in first(config)[2]
    rewrite(config, header={"plan": plan})
    assert first(config) is None
    edit(config, run__seed=1)
    found = replay_step(config.run.folder, 1, "experience")
    wrong = [one.item for one in found.compared if one.verdict == "different"]
    assert wrong == ["sampling seeds", "samples of the optimizer steps"]


def test_numbers_of_optimizer_steps_and_weights_are_compared_by_name(tmp_path):
    _config, step = recorded_run(tmp_path)
    record = to_record(step, "full")
    assert {one.verdict for one in compare_update(record, step, 1e-4)} == {"equal bit for bit"}
    report = step.reports["policy"]
    wrong = replace(report, step_metrics=[report.step_metrics[0], {"loss/policy_avg": 0.25}], grad_norms=[1.0, 2.00001])
    other = replace(step, reports={"policy": wrong}, after={"policy": {"embed": 1, "head": 3}})
    found = {one.item: (one.verdict, one.where) for one in compare_update(record, other, 1e-4) if one.verdict[0] != "e"}
    assert found == {
        "policy optimizer step 2: loss/policy_avg": ("different", "nan recorded, 0.25 replayed"),
        "policy optimizer step 2: grad_norm": ("within tolerance", "2.0 recorded, 2.00001 replayed"),
        "policy weights after the update": ("different", "first at head: 2 recorded, 3 replayed; 1 of 2 differ"),
    }


def test_another_setting_gives_its_metrics_next_to_the_recorded_ones(tmp_path):
    config, _ = recorded_run(tmp_path)
    outcome = replay_step(config.run.folder, 1, "experience", ["algorithm.kl.coefficient=0.5"])
    assert outcome.changes == ["algorithm.kl.coefficient: 0.05 -> 0.5"]
    pairs = {pair.name: pair for pair in outcome.metrics}
    assert pairs["objective/kl"].recorded == pairs["objective/kl"].replayed
    assert pairs["objective/rlhf_reward"].recorded != pairs["objective/rlhf_reward"].replayed
    assert outcome.first_difference is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "2"], r"step 2 has no record in .*: recorded are 1"),
        (["--step", "1", "--phase", "scores"], r"--phase scores: expected .*; did you mean score\?"),
        (["--step", "1", "--set", "reward.timeout_seconds=3"], r"--set reward.timeout_seconds: has no effect"),
        (["--step", "1", "--set", "algorithm.nothing=3"], r"command line: algorithm.nothing: unknown key"),
        (
            ["--step", "1", "--phase", "score", "--set", "train.epochs=3"],
            "--set compares metrics, of which phase score has none",
        ),
        (["--step", "1", "--phase", "sync", "--set", "train.epochs=3"], "of which phase sync has none"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path, arguments, said):
    config, _ = recorded_run(tmp_path)
    found = CliRunner().invoke(app, ["replay", str(config.run.folder), *arguments])
    assert isinstance(found.exception, UserError)
    assert re.search(said, str(found.exception))
    assert "\n" not in str(found.exception)


def test_responses_are_sampled_again_only_where_the_record_holds_all_that_was_read(tmp_path):
    config, step = recorded_run(tmp_path)
    rewrite(config, versions=lambda rows: [np.arange(len(row), dtype=np.int32) - len(row) for row in rows])
    assert len(sampled_again(read_record(config.run.folder / FOLDER, 1), step.scored.rollouts)) == 16
    rewrite(config, header={"version": 3})
    with pytest.raises(UserError, match="step 1: no response was sampled with the step's initial weights alone"):
        replay_step(config.run.folder, 1, "sync")
    edit(config, environment={"name": "guessing"})
    with pytest.raises(UserError, match="--phase sync: the record does not hold the turns of an environment or agent"):
        replay_step(config.run.folder, 1, "sync")


@pytest.mark.parametrize("exact", [True, False])
def test_responses_sampled_again_are_compared_up_to_the_first_other_token(exact):
    record = SimpleNamespace(header={"version": 0})
    rollouts = made_up().rollouts
    row = next(row for row, one in enumerate(rollouts) if len(one.response_ids) > 2)
    ids, logprobs = put(1, 7)(rollouts[row].response_ids), put(1, -9.0)(rollouts[row].logprobs)
    other = [*rollouts[:row], replace(rollouts[row], response_ids=ids, logprobs=logprobs), *rollouts[row + 1 :]]
    versions, tokens, found = compare_samples(record, rollouts, other[::-1], 1e-4, exact=exact)
    assert versions.verdict == found.verdict == "equal bit for bit"
    assert tokens.verdict == ("different" if exact else "within tolerance")
    assert f"first at row {row} (prompt {row // 2}, sample {row % 2}), token 1: [" in tokens.where
    wrong = [replace(one, versions=one.versions + 2, logprobs=one.logprobs - 1) for one in rollouts]
    verdicts = [one.verdict for one in compare_samples(record, rollouts, wrong, 1e-4, exact=exact)]
    assert verdicts == ["different", "equal bit for bit", "different"]


def test_a_folder_without_a_run_or_records_is_one_line(tmp_path):
    config, _ = recorded_run(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        replay_step(tmp_path, 1)
    for path in (config.run.folder / FOLDER).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no records of steps: expected a run with observe.record"):
        replay_step(config.run.folder, 1)


def test_a_step_without_a_checkpoint_before_it_names_those_that_can_be_replayed(tmp_path):
    config, step = recorded_run(tmp_path)
    recorder = FlightRecorder(config.run.folder / FOLDER, "light")
    for number in (3, 4):
        recorder(replace(step, step=number))
    recorder.close()
    with pytest.raises(UserError, match=r"step 4: no checkpoint before it to begin with; steps that can be replayed: 1$"):
        replay_step(config.run.folder, 4)


def test_the_command_prints_every_comparison_and_ends_with_1_if_one_differs(tmp_path):
    config, _ = recorded_run(tmp_path)
    command = ["replay", str(config.run.folder), "--step", "1", "--phase", "experience"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0
    assert re.search(r"experience +advantages +equal bit for bit: \d+ tokens of 16 samples", found.output)
    rewrite(config, experience__advantages=at(7, lambda row: row + np.float32(0.01)))
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 1
    assert "step 1: differs from its record; first in experience: advantages, first at row 7" in found.output


def test_a_recorder_writes_in_the_background_and_tells_what_it_could_not_write(tmp_path, monkeypatch):
    config, step = recorded_run(tmp_path)
    recorder = FlightRecorder(tmp_path / "records", "light")
    recorder(step)
    recorder.rewind(1)
    assert read_record(tmp_path / "records", 1).header["drawn"] == list(range(8))
    assert recorder.cpu_seconds() > 0
    assert recorder.cpu_seconds() == 0

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rayrlhf.observe.flight_record.write_atomically", full)
    recorder(executed(config, made_up()))
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        recorder.close()
