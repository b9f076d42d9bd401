"""Processes of a real run are killed from inside it: the run heals, goes back to a checkpoint, or ends with the reason."""

import os
import re
import signal
import time

import pytest
import ray

from rayrlhf.actors import model_loading
from rayrlhf.errors import ActorLostError
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.checkpoint import list_checkpoints
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

SETTINGS = [
    "rollout.backend=transformers",
    "rollout.replicas=2",
    "critic.kind=shared",
    "evaluation.enabled=false",
    "recovery.ping_every=0.5",
    "recovery.ping_deadline=3",
]


class Hurt(Callback):
    """After given steps, once each, sends a signal to a process of a role; keeps the weight versions of all rollouts."""

    def __init__(self, hurts):
        self.hurts = dict(hurts)
        self.versions = {}
        self.tokens = {}

    def on_step_end(self, step, metrics, scored):
        self.versions[step] = {int(version) for rollout in scored.rollouts for version in rollout.versions}
        self.tokens[step] = [rollout.response_ids.tolist() for rollout in scored.rollouts]
        for role, number in self.hurts.pop(step, ()):
            os.kill(self.pids[role], number)

    def on_start(self, trainer):
        roles = ("policy", "reward", "reference", "rollout")
        self.pids = {role: ray.get(trainer.actor_groups[role].handles[-1].ping.remote()).pid for role in roles}


@pytest.fixture(scope="module")
def healed(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("healed"), *SETTINGS, "run.steps=5", "checkpoint.every=2", "checkpoint.keep=9")
    hurt = Hurt(
        {
            1: [("rollout", signal.SIGKILL), ("reward", signal.SIGKILL)],
            3: [("policy", signal.SIGKILL)],
            4: [("reference", signal.SIGSTOP)],
        }
    )
    true_time, undo = time.time, pytest.MonkeyPatch()
    # The driver's clock goes back a day while processes are rebuilt: no deadline and no duration is read from it.
    undo.setattr(time, "time", lambda: true_time() - (86400.0 if hurt.versions else 0.0))
    result = train_ppo(config, [hurt])
    undo.undo()
    return config, result, hurt


def events(config, kind):
    return [event["actor"] for event in read_journal(config.run.folder) if event["event"] == kind]


@pytest.mark.slow
def test_a_run_that_loses_a_process_of_every_role_reaches_its_last_step(healed):
    config, result, _ = healed
    assert result.steps == 5
    assert [row["step"] for row in read_metrics(config.run.folder) if "lr" in row] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_lost_replicas_and_stateless_roles_are_rebuilt_and_written_down_with_their_times(healed):
    config, _, _ = healed
    assert {"ppo/rollout/1", "ppo/reward/0", "ppo/reference/0"} <= set(events(config, "recovered"))
    assert all(event["seconds"] > 0 for event in read_journal(config.run.folder) if event["event"] == "recovered")


@pytest.mark.slow
def test_a_lost_policy_takes_the_run_back_to_its_newest_checkpoint(healed):
    config, _, _ = healed
    (replayed,) = (event for event in read_journal(config.run.folder) if event["event"] == "replayed")
    assert replayed["actor"] == "ppo/policy/0"
    assert replayed["reason"] == "back at step 2"


@pytest.mark.slow
def test_a_stopped_process_is_ended_after_its_ping_deadline(healed):
    config, _, _ = healed
    assert events(config, "hung") == ["ppo/reference/0"]
    (hung,) = (event["reason"] for event in read_journal(config.run.folder) if event["event"] == "hung")
    said = (
        r"ppo/reference/0 \(process \d+ on node [\d.]+\): no response to a ping for 3 s; "
        r"the run waits for .+ called \d+ s ago; "
    )
    assert re.match(said, hung)


@pytest.mark.slow
def test_every_rollout_is_of_the_weights_of_the_step_before_also_from_rebuilt_replicas(healed):
    _, _, hurt = healed
    assert hurt.versions == {1: {-1}, 2: {1}, 3: {2}, 4: {3}, 5: {4}}


@pytest.mark.slow
def test_every_due_checkpoint_is_there_and_whole_and_nothing_half_written(healed):
    from rayrlhf.storage.manifest import verify

    config, _, _ = healed
    folder = config.run.folder / "checkpoints"
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [2, 4, 5]
    assert {"policy/random-00000.pt", "state.json"} <= set(verify(folder / "step-000004").files)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_a_replica_that_is_lost_again_and_again_ends_the_run_with_the_reason_and_a_checkpoint(tmp_path):
    config = run_config(
        tmp_path,
        *SETTINGS,
        "run.steps=3",
        "recovery.attempts=1",
        "rollout.replicas=1",
        "checkpoint.best_metric=objective/scores",
    )

    class KillEveryReplica(Callback):
        def on_step_end(self, step, metrics, scored):
            self.actor_groups["rollout"].handles[0].__ray_call__.remote(lambda worker: os._exit(1))

        def on_start(self, trainer):
            self.actor_groups = trainer.actor_groups
            restart = type(trainer.actor_groups).restart

            def doomed(actor_groups, role, rank):
                built = restart(actor_groups, role, rank)
                actor_groups[role].handles[rank].__ray_call__.remote(lambda worker: os._exit(1))
                return built

            self.actor_groups.__class__.restart = doomed
            self.undo = lambda: setattr(self.actor_groups.__class__, "restart", restart)

    killer = KillEveryReplica()
    try:
        with pytest.raises(ActorLostError, match=r"rollout replicas: 0 of 1 serve, 1 are needed .*was lost during"):
            train_ppo(config, [killer])
    finally:
        killer.undo()
    assert [checkpoint.step for checkpoint in list_checkpoints(config.run.folder / "checkpoints")] == [1]


@pytest.mark.slow
def test_with_recovery_switched_off_the_first_loss_ends_the_run_by_name(tmp_path):
    config = run_config(tmp_path, *SETTINGS, "run.steps=3", "recovery.enabled=false")
    with pytest.raises(ActorLostError, match="ppo/reward/0 was lost during reward"):
        train_ppo(config, [Hurt({1: [("reward", signal.SIGKILL)]})])


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        pytest.param(signal.SIGKILL, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, ["deadlines.start=80", "recovery.ping_deadline=9"], marks=pytest.mark.nightly),
    ],
)
def test_processes_that_die_or_stop_while_models_load_are_replaced(tmp_path, monkeypatch, number, settings):
    hurt = ("policy", "reward", "rollout")
    opened = []

    class Loading(model_loading._Loading):
        def __init__(self, actor_groups, *rest):
            super().__init__(actor_groups, *rest)
            opened.append(actor_groups)

    def kill_first(*arguments):
        if not killed:
            for role in hurt:
                handle = opened[0][role].handles[0]
                killed.append(ray.get(handle.ping.remote()).pid)
                os.kill(killed[-1], number)
        return waited(*arguments)

    killed, waited = [], model_loading.wait_any
    monkeypatch.setattr(model_loading, "_Loading", Loading)
    monkeypatch.setattr(model_loading, "wait_any", kill_first)
    config = run_config(tmp_path, *SETTINGS, "rollout.replicas=1", "run.steps=1", *settings)
    assert train_ppo(config).steps == 1
    names = [f"ppo/{role}/0" for role in hurt]
    assert sorted(events(config, "lost")) == sorted(events(config, "recovered")) == names
    assert len(killed) == 3
    assert number == signal.SIGKILL or sorted(events(config, "silent")) == sorted(events(config, "hung")) == names
