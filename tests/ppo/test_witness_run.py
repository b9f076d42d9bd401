"""The witness of real runs: a fault planted in the driver ends the step and is named, and what has none goes on."""

from dataclasses import replace

import numpy as np
import pytest

import rayrlhf
import rayrlhf.ppo.model_updater as model_updater
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.generation import Generation
from rayrlhf.ppo.scoring import Scorer
from rayrlhf.ppo.update_objectives import plan_update
from tests.ppo.runs import run_config


def scored(change):
    """Let `change` harm the scored rollouts of a step."""

    def plant(patch):
        real = Scorer.finish
        patch.setattr(Scorer, "finish", lambda scorer: change(real(scorer)))

    return plant


def without_one(found):
    kept = list(range(1, len(found.rollouts)))
    parts = {name: values[kept] for name, values in found.rewards.parts.items()}
    rewards = replace(found.rewards, scores=found.rewards.scores[kept], parts=parts, seals=found.rewards.seals[1:])
    passes = {name: values[1:] for name, values in found.forward_passes.items()}
    return replace(found, rollouts=found.rollouts[1:], rewards=rewards, forward_passes=passes)


def other_scores(found):
    return replace(found, rewards=replace(found.rewards, scores=np.roll(found.rewards.scores + np.arange(16), 1).astype("f4")))


def earlier_step(found):
    first = found.rollouts[0]
    return replace(found, rollouts=(replace(first, key=first.key._replace(step=first.key.step - 1)), *found.rollouts[1:]))


def sampled_twice(patch):
    real = Generation.collect

    def collect(generation, batch):
        for finished in real(generation, batch):
            yield [*finished, finished[0]]

    patch.setattr(Generation, "collect", collect)


def planned(change):
    def plant(patch):
        patch.setattr(model_updater, "plan_update", lambda *given: UpdatePlan(change(plan_update(*given).epochs)))

    return plant


FAULTS = {
    "lost": (scored(without_one), r"sample 0 of prompt \d+ was sampled and is not in the batch"),
    "swapped rewards": (scored(other_scores), r"sample 0 of prompt \d+ has the reward \S+, which was computed for another one"),
    "another step": (scored(earlier_step), r"sample 0 of prompt \d+ belongs to step \d"),
    "sampled twice": (sampled_twice, r"sample 0 of prompt \d+ was sampled twice"),
    "left out of an epoch": (
        planned(lambda epochs: [*epochs[:-1], [epochs[-1][0][1:], *epochs[-1][1:]]]),
        r"sample 0 of prompt \d+ is in 0 optimizer steps of the policy in epoch 2, expected 1",
    ),
    "twice in an epoch": (
        planned(lambda epochs: [[epochs[0][0], [*epochs[0][1][1:], epochs[0][0][0]]], *epochs[1:]]),
        r"sample 0 of prompt \d+ is in [02] optimizer steps of the policy in epoch 1, expected 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1], ids=["synchronous", "asynchronous"])
def test_each_planted_fault_ends_its_step_and_is_named(tmp_path, ahead):
    config = run_config(
        tmp_path,
        "rollout.backend=transformers",
        "critic.kind=shared",
        "train.epochs=2",
        f"async.max_staleness={ahead}",
        "run.steps=20",
        "evaluation.enabled=false",
    )
    with rayrlhf.open_trainer(config) as trainer:
        assert trainer.train_step()["ledger/trained"] == 16
        for plant, message in FAULTS.values():
            with pytest.MonkeyPatch.context() as patch:
                plant(patch)
                with pytest.raises(AlarmError, match=f"^step {trainer.steps_done + 1}: {message}"):
                    trainer.train_step()
            state = trainer._driver.state()
            trainer._driver.load_state(state | {"step": trainer.steps_done})
        metrics = trainer.train_step()
        assert metrics["ledger/issued"] == metrics["ledger/trained"] == 16
        print(f"witness: {metrics['time/witness']:.4f} s of a step of {metrics['time/step']:.2f} s")
