"""Custom loops over `rayrlhf.open_trainer`: their rewards are trained on, and they recover, resume and clean up."""

import os
import signal
from itertools import pairwise

import numpy as np
import psutil
import pytest
import ray
import yaml

import rayrlhf
from rayrlhf.errors import UserError
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from tests.ppo.runs import digit_share, run_config

pytestmark = pytest.mark.slow

OWN = ["rollout.backend=transformers", "critic.kind=shared", "reward={given_by_loop: true}", "run.steps=3"]


def own_rewards(scored):
    return digit_share([rollout.text for rollout in scored.rollouts])


class Scored(Callback):
    """Keeps the scored rollouts of every step, and the first and last events."""

    def __init__(self):
        self.scored, self.ended = {}, False

    def on_step_end(self, step, metrics, scored):
        self.scored[step] = scored

    def on_end(self, trainer):
        self.ended = True


class Interruption(Exception):
    pass


@pytest.fixture(scope="module")
def session():
    """A Ray that the runs of this module share: a connection that exists is used and left open."""
    ray.init(namespace="rayrlhf", log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class CustomLoop:
    """Trains with its own rewards; raises with drawn prompts after a number of steps."""

    def __init__(self, interrupt_after=None):
        self.interrupt_after = interrupt_after
        self.drawn, self.rewards, self.kept = [], [], Scored()

    def run(self, config, finish=lambda trainer: None):
        with rayrlhf.open_trainer(config, [self.kept]) as trainer:
            self.roles = set(trainer.actor_groups.groups)
            self.process = psutil.Process(ray.get(trainer.actor_groups["policy"].handles[0].ping.remote()).pid)
            self.begun = trainer.steps_done
            for step in trainer.steps():
                prompts = trainer.prompts()
                self.drawn.append([prompt.id for prompt in prompts])
                if step == self.interrupt_after:
                    self.saved = trainer.save()
                    raise Interruption
                scored = trainer.score(prompts, trainer.generate(prompts))
                self.rewards.append(trainer.step(scored, own_rewards(scored))["reward/loop"])
            return finish(trainer)


def leave_results(trainer):
    evaluation = trainer.evaluate(lambda prompts, rollouts: [float(len(prompt.text)) for prompt in prompts])
    texts = [trainer.chat("say 3"), trainer.chat([{"role": "user", "content": "say 3"}])]
    return evaluation, texts, trainer.export(trainer.folder / "elsewhere")


@pytest.fixture(scope="module")
def interrupted(session, tmp_path_factory):
    """Two steps, a checkpoint, prompts that are drawn and not used, and an exception; then the rest in a second block."""
    config = run_config(tmp_path_factory.mktemp("own"), *OWN)
    first, second = CustomLoop(interrupt_after=2), CustomLoop()
    with pytest.raises(Interruption):
        first.run(config)
    alive = psutil.wait_procs([first.process], timeout=30)[1]
    return config, first, second, alive, second.run(config, leave_results)


def test_an_exception_in_the_block_ends_the_actors_and_a_second_block_resumes(interrupted):
    config, first, second, alive, _ = interrupted
    assert alive == []
    assert not first.kept.ended
    assert second.kept.ended
    assert first.saved == config.run.folder / "checkpoints" / "step-000002"
    assert second.begun == 2
    assert [row["step"] for row in read_metrics(config.run.folder) if "lr" in row] == [1, 2, 3]


def test_prompts_that_were_drawn_and_not_used_are_drawn_again_first(interrupted):
    _, first, second, *_ = interrupted
    assert first.drawn[2] == second.drawn[0]
    assert sorted(first.drawn[0] + first.drawn[1]) == list(range(32))
    assert {rollout.key.step for rollout in second.kept.scored[3].rollouts} == {2}
    assert list(first.kept.scored) == [1, 2]


def test_own_rewards_are_trained_on_without_a_reward_actor(interrupted):
    config, first, *_ = interrupted
    assert first.roles == {"policy", "reference", "rollout"}
    rows = [row for row in read_metrics(config.run.folder) if "lr" in row]
    for row, reward, scored in zip(rows, first.rewards, first.kept.scored.values(), strict=False):
        assert scored.rewards.scores.tolist() == pytest.approx(own_rewards(scored))
        assert row["objective/scores"] == pytest.approx(np.mean(own_rewards(scored)), abs=1e-6)
        assert reward == pytest.approx(np.mean(own_rewards(scored)))


def test_evaluation_chat_and_export_use_the_current_policy(interrupted):
    config, *_, (evaluation, texts, exported) = interrupted
    assert evaluation.step == 3
    assert evaluation.mean_score == np.mean([len(prompt.text) for prompt in evaluation.prompts])
    assert texts[0] == texts[1]
    assert (exported / "model.safetensors").is_file()
    assert not (config.run.folder / "export" / "model.safetensors").exists()


def test_wrong_rewards_are_refused_in_one_line_and_the_block_goes_on(session, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path, *OWN, "run.steps=1").model_dump(mode="json", by_alias=True)))
    with rayrlhf.open_trainer(str(path)) as trainer:
        prompts = trainer.prompts(4)
        scored = trainer.score(prompts, trainer.generate(prompts))
        assert np.isnan(scored.rewards.scores).all()
        assert scored.forward_passes.keys() == {"policy", "reference"}
        for rewards, message in [
            (None, "the configuration has no reward"),
            ([1.0], "returned 1 values, expected 4"),
            ([1.0, 2.0, float("nan"), 3.0], "returned float nan for sample 2"),
            ([[1.0]] * 4, "expected a list of"),
        ]:
            with pytest.raises(UserError, match=message):
                trainer.step(scored, rewards)
        with pytest.raises(UserError, match=r"evaluate\(reward=...\)"):
            trainer.evaluate()
        with pytest.raises(UserError, match="the prompt has 118 tokens, expected 1 to 56"):
            trainer.chat("x" * 99)
        assert trainer.step(scored, [[0.5] * len(rollout.response_ids) for rollout in scored.rollouts])["objective/scores"] > 0
    with pytest.raises(UserError, match=r"reward\.given_by_loop: the built-in loop has no rewards"):
        rayrlhf.train_ppo(trainer.config)


@pytest.mark.nightly
def test_a_policy_that_dies_in_a_loop_of_ones_own_takes_it_back_to_the_committed_state(session, tmp_path):
    config = run_config(tmp_path, *OWN, "recovery.snapshot=step", "recovery.backoff=0")
    begun, killed = [], False
    with rayrlhf.open_trainer(config) as trainer:
        for step in trainer.steps():
            begun.append(step)
            with trainer.recovering():
                scored = trainer.generate_and_score(trainer.prompts())
                if step == 1 and not killed:
                    killed = True
                    os.kill(ray.get(trainer.actor_groups["policy"].handles[0].ping.remote()).pid, signal.SIGKILL)
                trainer.step(scored, own_rewards(scored))
        trainer.export()
    assert begun == [0, 1, 1, 2]
    assert [row["step"] for row in read_metrics(config.run.folder) if "lr" in row] == [1, 2, 3]
    assert "replayed" in [event["event"] for event in read_journal(config.run.folder)]
    assert all(earlier <= later for earlier, later in pairwise(begun))
