"""Steps of real runs are executed again from their records on the run's own models: bit for bit, and faults by name."""

import json
import shutil

import pytest

from rayrlhf.errors import AlarmError, UserError
from rayrlhf.observe.flight_record import FOLDER, read_record, recorded_steps
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo import replay
from rayrlhf.ppo.checkpoint import list_checkpoints
from rayrlhf.ppo.replay import replay_step
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.weight_sync.driver import SyncReport
from tests.ppo.records import rewrite
from tests.ppo.replays import bits, keeping_actors
from tests.ppo.runs import run_config
from tests.ppo.test_replay import edit

SETTINGS = [
    "rollout.backend=transformers",
    "model.dtype=float32",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "evaluation.enabled=false",
    "observe.tensorboard=false",
    "train.epochs=2",
]
AGENTS = [
    "model.path=builtin:tiny?layers=1&hidden=64&context=256",
    "reward.functions=[{name: environment}]",
    "environment={name: 'tests.environments.agents:forgetful', max_turn_tokens: 2}",
    "rollout.max_new_tokens=120",
    "rollout.max_model_length=256",
]
"""An agent with two conversations of each sample."""

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.slow
def test_adapters_turns_and_staleness_replay_bit_for_bit_too(tmp_path):
    config = run_config(
        tmp_path,
        *SETTINGS,
        "critic.kind=shared",
        "model.lora={rank: 4}",
        "async.max_staleness=1",
        "reward.functions=[{name: environment}]",
        "environment={name: guessing, max_turns: 3, max_turn_tokens: 2}",
        "rollout.max_new_tokens=12",
        "observe.record=light",
    )
    train_ppo(config)
    assert recorded_steps(config.run.folder / FOLDER) == [1, 2]
    outcome = replay_step(config.run.folder, 2)
    assert bits(outcome) == {"equal bit for bit"}


@pytest.mark.slow
def test_agents_on_two_ranks_replay_bit_for_bit_and_on_one_rank_within_rounding(tmp_path):
    config = run_config(
        tmp_path,
        *SETTINGS,
        *AGENTS,
        "critic.kind=shared",
        "placement.policy.ranks=2",
        "rollout.replicas=2",
        "run.determinism=exact",
        "observe.record=full",
    )
    train_ppo(config)
    assert len(read_record(config.run.folder / FOLDER, 2).columns["prompt"]) == 32  # two conversations of each sample
    last = read_metrics(config.run.folder)[-1]
    assert min(last["time/record"], last["time/checksums"]) > 0
    assert "time/record/thread" in last
    assert bits(replay_step(config.run.folder, 2)) == {"equal bit for bit"}
    moved = replay_step(config.run.folder, 2, "update", ["placement.policy.ranks=1"])
    assert bits(moved) == {"equal bit for bit", "within tolerance"}, "\n".join(moved.lines())
    with pytest.raises(UserError, match=r"--phase sync: the record does not hold the turns of an environment or agent"):
        replay_step(config.run.folder, 2, "sync")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A synchronous exact run of all weights with a separate critic."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(folder, *SETTINGS, "run.determinism=exact", "observe.record=full", "run.steps=3")
    train_ppo(config)
    return config


@pytest.fixture
def own(run, tmp_path):
    """A copy of the run, to plant faults in."""
    shutil.copytree(run.run.folder, tmp_path / "run")
    return run.model_copy(update={"run": run.run.model_copy(update={"root": tmp_path, "name": "run"})})


@pytest.fixture(scope="module")
def kept_actors():
    """Keep the actors of the first replay for those after it."""
    with keeping_actors():
        yield


def first(config, step, phase="all"):
    found = replay_step(config.run.folder, step, phase).first_difference
    return found and (found.phase, found.item, found.where)


@pytest.mark.slow
def test_replicas_sample_the_recorded_responses_again_from_the_weights_that_they_get(own, monkeypatch):
    with keeping_actors(("reward", "reference")):
        outcome = replay_step(own.run.folder, 3, "sync")
        assert [one.verdict for one in outcome.compared] == ["equal bit for bit"] * 3
        assert outcome.compared[1].where == "16"
        rewrite(own, 3, logprobs=lambda rows: [*rows[:4], rows[4] - 0.5, *rows[5:]])
        assert first(own, 3, "sync")[:2] == ("sync", "log-probs sampled again")
        # Weights that do not arrive: the replicas keep those before step 3.
        monkeypatch.setattr("rayrlhf.ppo.step_driver.sync_weights", lambda *_: SyncReport(1, 0, 0.0))
        assert first(own, 2, "sync")[:2] == ("sync", "weight version of the replicas")


@pytest.mark.slow
def test_a_step_replays_bit_for_bit_from_the_checkpoint_before_it(run, kept_actors):
    outcome = replay_step(run.run.folder, 3)
    assert bits(outcome) == {"equal bit for bit"}
    assert outcome.lines()[0] == "step 3, from step-000002"
    items = {one.item for one in outcome.compared}
    assert {"policy logprobs", "reference logprobs", "critic values", "advantages", "returns", "metrics"} <= items
    assert {f"{role} optimizer step {step}" for role in ("policy", "critic") for step in (1, 2, 3, 4)} <= items
    assert {f"{role} weights {when} the update" for role in ("policy", "critic") for when in ("before", "after")} <= items


@pytest.mark.slow
def test_recorded_steps_lead_from_an_older_checkpoint_or_the_start_to_a_step(own, kept_actors):
    checkpoints = {one.step: one.folder for one in list_checkpoints(own.run.folder / "checkpoints")}
    shutil.rmtree(checkpoints[2])
    outcome = replay_step(own.run.folder, 3, "update")
    assert outcome.origin == "from step-000001 over steps 2"
    assert outcome.first_difference is None
    for path in (own.run.folder / FOLDER).glob("step-000002.*"):
        path.unlink()
    with pytest.raises(Exception, match=r"step 3: no checkpoint before it .* can be replayed: 1$"):
        replay_step(own.run.folder, 3)


@pytest.mark.slow
def test_faults_of_a_run_are_found_in_their_phase_at_the_first_place(own, kept_actors, monkeypatch):
    # Stale weights: those before step 3 are those before step 2.
    older, load = list_checkpoints(own.run.folder / "checkpoints")[0], replay.load_checkpoint

    def stale(checkpoint, *rest):
        load(older, *rest)
        return json.loads((checkpoint.folder / "state.json").read_text())

    with monkeypatch.context() as patch:
        patch.setattr(replay, "load_checkpoint", stale)
        with pytest.raises(AlarmError, match="step 3: the policy had taken 4 optimizer steps before it, expected 8"):
            first(own, 3, "update")
    # Other weights than recorded, with the right number of optimizer steps.
    before = read_record(own.run.folder / FOLDER, 3).header["before"]
    name = list(before["policy"])[1]
    rewrite(own, 3, header={"before": {**before, "policy": {**before["policy"], name: 0}}})
    phase, item, where = first(own, 3, "update")
    assert (phase, item) == ("update", "policy weights before the update")
    assert where.startswith(f"first at {name}: ")
    # Another template: a prompt's last token.
    record = read_record(own.run.folder / FOLDER, 2)
    ids = record.columns["prompt_ids"][0].copy()
    ids[-1] += 1
    rewrite(own, 2, prompt_ids=lambda rows: [ids, *rows[1:]])
    phase, item, where = first(own, 2, "score")
    assert (phase, item) == ("score", "critic values")
    assert where.startswith("first at row 0 (")
    rewrite(own, 2, prompt_ids=lambda rows: record.columns["prompt_ids"])
    # Shifted log-probs of the rollout engine.
    rewrite(own, 2, logprobs=lambda rows: [*rows[:4], rows[4] - 0.5, *rows[5:]])
    assert first(own, 2, "score")[:2] == ("score", replay.ENGINE)
    rewrite(own, 2, logprobs=lambda rows: record.columns["logprobs"])
    # Another temperature.
    edit(own, rollout__temperature=0.7)
    assert first(own, 2, "score")[:2] == ("score", "policy logprobs")
    edit(own, rollout__temperature=1.0)
    # A wrong denominator of the loss.
    loss = own.algorithm.policy_loss.model_dump(mode="json")
    edit(own, algorithm__policy_loss={**loss, "loss_aggregation": "constant", "loss_aggregation_length": 16})
    phase, item, _ = first(own, 2, "update")
    assert phase == "update"
    assert item.startswith("policy optimizer step 1: ")


@pytest.mark.slow
def test_the_same_rollouts_under_another_setting_give_other_metrics(run, kept_actors):
    outcome = replay_step(
        run.run.folder, 2, "update", ["algorithm.policy_loss.clip_low=0.001", "algorithm.policy_loss.clip_high=0.001"]
    )
    pairs = {pair.name: pair for pair in outcome.metrics}
    assert pairs["objective/scores"].recorded == pairs["objective/scores"].replayed
    assert pairs["policy/clipfrac_avg"].replayed > pairs["policy/clipfrac_avg"].recorded
