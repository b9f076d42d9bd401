"""Random recorded steps of ten kinds of runs are executed again bit for bit: 40 steps, about half an hour on two cores.

`RAYRLHF_REPLAY_KINDS` is the number of kinds, if not all ten.
"""

import os
import random
import signal
from itertools import product

import pytest
import ray

from rayrlhf.errors import StoppedError
from rayrlhf.observe.flight_record import FOLDER, recorded_steps
from rayrlhf.observe.journal import read_journal
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.replay import replay_step
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.replays import bits, keeping_actors
from tests.ppo.runs import run_config
from tests.ppo.test_replay_run import AGENTS, SETTINGS

STEPS, REPLAYS = 7, 4
KINDS = random.Random(4).sample(list(product(*[(False, True)] * 5)), 10)
"""Asynchronous, SmolLM2-135M, with adapters, of an agent, killed."""
SMOLLM2 = ["model.path=builtin:smollm2-135m-instruct", "rollout.max_model_length=256"]
DEATHS = ("rollout", "policy", "driver")


class Death(Callback):
    """Kills a process of a role after a step, or lets the driver be stopped."""

    def __init__(self, role, step):
        self.role, self.step = role, step

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step_end(self, step, metrics, scored):
        if step == self.step:
            self.step = None
            if self.role == "driver":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                handle = self.trainer.actor_groups[self.role].handles[-1]
                os.kill(ray.get(handle.ping.remote()).pid, signal.SIGKILL)


def recorded(folder, number, ahead, smollm2, adapters, agent, killed):
    """Run PPO of a kind; returns its folder."""
    config = run_config(
        folder,
        *SETTINGS,
        "checkpoint.every=2",
        "critic.kind=shared",
        f"run.seed={number}",
        f"run.steps={STEPS}",
        "observe.record=full",
        "placement.overlap=off",
        "recovery.ping_every=0.5",
        *(AGENTS if agent else []),
        *(SMOLLM2 if smollm2 else []),
        *(["model.lora={rank: 4}"] if adapters else []),
        *(["async.max_staleness=1"] if ahead else ["run.determinism=exact", "placement.overlap=auto"]),
    )
    death = Death(DEATHS[number % len(DEATHS)], 3)
    try:
        train_ppo(config, [death] if killed else [])
    except StoppedError:
        train_ppo(config)
    lost = [event for event in read_journal(config.run.folder) if event["event"] == "lost"]
    assert bool(lost) == (killed and death.role != "driver")
    assert recorded_steps(config.run.folder / FOLDER) == list(range(1, STEPS + 1))
    return config.run.folder


def test_ten_kinds_differ_in_everything():
    assert len(set(KINDS)) == 10
    assert all({kind[place] for kind in KINDS} == {False, True} for place in range(5))


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(int(os.environ.get("RAYRLHF_REPLAY_KINDS", "10"))))
def test_random_steps_of_a_kind_of_run_replay_bit_for_bit(tmp_path, number):
    folder = recorded(tmp_path, number, *KINDS[number])
    with keeping_actors():
        for step in random.Random(number).sample(range(3, STEPS + 1), REPLAYS):
            assert bits(replay_step(folder, step)) == {"equal bit for bit"}, (KINDS[number], step)
