"""A run with a judge inside it: replicas of the judge are killed, and every response has its own score."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import ray

from rayrlhf.actors.waiting import pending_calls
from rayrlhf.engines.scoring.judge_engine import JudgeEngine
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.samples import read_samples
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.rewards.functions import ScoringBatch
from tests.ppo.runs import digit_share, run_config

JUDGE = (
    "{model: {path: 'builtin:tiny?layers=2&hidden=64&context=128&seed=3', dtype: float32}, backend: transformers, weight: 2.0, "
    "min_mass: 0.0, template: '{prompt}: {response} {number}'"
)
SETTINGS = ["rollout.backend=transformers", "critic.kind=shared", "rollout.samples_per_prompt=2", "rollout.prompts_per_step=8"]


class KillsJudges(Callback):
    """Kills one replica between two steps, and later another during its call."""

    def on_start(self, trainer):
        handles = trainer.actor_groups["judge"].handles
        self.pids = [ray.get(handle.ping.remote()).pid for handle in handles]
        self.in_call = threading.Event()

    def on_step_end(self, step, metrics, scored):
        if step == 1:
            os.kill(self.pids[1], signal.SIGKILL)
        if step == 2:
            threading.Thread(target=self._kill_in_call, daemon=True).start()

    def _kill_in_call(self):
        while "judge" not in pending_calls():
            time.sleep(0.0005)
        os.kill(self.pids[0], signal.SIGKILL)
        self.in_call.set()


@pytest.mark.slow
def test_a_run_whose_judge_loses_replicas_scores_every_response_once_and_rightly(tmp_path):
    config = run_config(tmp_path, *SETTINGS, f"reward.judge={JUDGE}, replicas: 2}}", "run.steps=4", "evaluation.every=2")
    kills = KillsJudges()
    assert train_ppo(config, [kills]).steps == 4
    assert kills.in_call.is_set()
    events = [(event["event"], event["actor"]) for event in read_journal(config.run.folder)]
    assert {("lost", f"ppo/judge/{rank}") for rank in (0, 1)} | {("recovered", f"ppo/judge/{rank}") for rank in (0, 1)} <= set(
        events
    )
    rows = [row for row in read_metrics(config.run.folder) if "ledger/issued" in row]
    assert [(row["step"], row["ledger/issued"], row["ledger/trained"]) for row in rows] == [
        (step, 16, 16) for step in range(1, 5)
    ]
    assert all(row["reward/judge_model_missing"] == 0 and row["time/judge"] > 0 for row in rows)
    for folder in ("samples", "evaluation"):
        _check_scores(config, list(read_samples(config.run.folder / folder)))


def _check_scores(config, samples):
    """Compare scores with those of a judge of the test's own."""
    assert samples
    judge = JudgeEngine(config.reward.judge, config.run.seed)
    columns = {"number": [row["prompt_id"] for row in samples]}
    batch = ScoringBatch([row["prompt"] for row in samples], [row["response"] for row in samples], columns)
    expected = judge.parts(batch, [row["prompt_id"] for row in samples])["judge_model"]
    np.testing.assert_allclose([row["reward/judge_model"] for row in samples], expected, atol=1e-5)
    np.testing.assert_allclose([row["score"] for row in samples], 2 * expected + digit_share(batch.responses), atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["pairwise", "listwise"])
def test_a_run_on_comparisons_alone_replaces_lost_vllm_judges(tmp_path, mode):
    judge = JUDGE.replace("template: '{prompt}: {response} {number}'", f"mode: {mode}").replace("transformers", "vllm")
    judge = judge.replace("context=128", "context=1024")
    config = run_config(
        tmp_path,
        *SETTINGS,
        "reward.functions=[]",
        f"reward.judge={judge}, replicas: 2}}",
        "evaluation.enabled=false",
        "run.steps=4",
    )
    kills = KillsJudges()
    assert train_ppo(config, [kills]).steps == 4
    rows = [row for row in read_metrics(config.run.folder) if "ledger/issued" in row]
    assert kills.in_call.is_set()
    events = {(event["event"], event["actor"]) for event in read_journal(config.run.folder)}
    assert {(event, f"ppo/judge/{rank}") for event in ("lost", "recovered") for rank in (0, 1)} <= events
    assert [row["reward/judge_model"] for row in rows] == pytest.approx([0.5] * 4)  # of two responses, the scores add up to 1
