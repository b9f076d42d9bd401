"""Whole runs that sample ahead: tokens no older than allowed, no prompt lost or trained on twice, also under losses."""

import os
import signal

import numpy as np
import pytest
import ray

from rayrlhf.errors import StoppedError
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config, tool_agent

SETTINGS = [
    "rollout.backend=transformers",
    "critic.kind=shared",
    "rollout.max_new_tokens=32",
    "rollout.max_concurrent=2",  # sampling a step then takes longer than training on it, so that updates come in between
    "recovery.ping_every=0.5",
    "recovery.ping_deadline=5",
]

pytestmark = pytest.mark.usefixtures("cluster")


class Books(Callback):
    """Notes which prompts and weight versions every step trained on, and does something once after a step."""

    def __init__(self, after=None, do=None):
        self.prompts, self.versions = {}, {}
        self.after, self.do = after, do
        self.trainer = None

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step_end(self, step, metrics, scored):
        self.prompts[step] = [rollout.key.prompt for rollout in scored.rollouts]
        self.versions[step] = [rollout.versions for rollout in scored.rollouts]
        if step == self.after:
            self.after = None
            self.do(self.trainer)

    def trained_on(self):
        return sorted(prompt for prompts in self.prompts.values() for prompt in prompts)


def kill(role):
    def do(trainer):
        os.kill(ray.get(trainer.actor_groups[role].handles[-1].ping.remote()).pid, signal.SIGKILL)

    return do


def run(folder, *overrides, books=None):
    config = run_config(folder, *SETTINGS, *overrides)
    books = books or Books()
    with pytest.MonkeyPatch.context() as patch:
        # A tiny model answers a whole step within a usual poll: polls of a few tokens let updates come in between.
        patch.setattr("rayrlhf.ppo.step_driver.POLL_SECONDS", 0.02)
        train_ppo(config, [books])
    rows = [row for row in read_metrics(config.run.folder) if "sampling/staleness/max" in row]
    return config, books, rows


def epochs(count):
    """What `count` prompts of the 32-prompt set are when none is lost and none comes twice in an epoch: whole epochs."""
    return sorted([*range(32)] * (count // 32))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Six steps, the replica killed while it samples ahead, and the answers of held-out prompts in between."""
    folder = tmp_path_factory.mktemp("continued")
    settings = ["async.max_staleness=2", "run.steps=6", "evaluation.every=2", "checkpoint.every=3"]
    return run(folder, *settings, books=Books(2, kill("rollout")))


@pytest.mark.slow
def test_tokens_are_old_but_never_older_than_allowed(continued):
    _, books, rows = continued
    ages = [row["sampling/staleness/max"] for row in rows]
    assert len(ages) == 6
    assert max(ages) > 0
    assert max(ages) <= 2
    assert {row["sampling/staleness/limit"] for row in rows} == {2.0}
    for step, versions in books.versions.items():
        assert min(int(version) for tokens in versions for version in tokens.clip(0)) >= step - 1 - 2


@pytest.mark.slow
def test_some_responses_go_on_over_an_update(continued):
    _, books, _ = continued
    every = [tokens for versions in books.versions.values() for tokens in versions]
    assert any(len(set(tokens.tolist())) > 1 for tokens in every)
    assert all((np.diff(tokens) >= 0).all() for tokens in every)


@pytest.mark.slow
def test_no_prompt_is_lost_or_trained_on_twice_when_the_replica_dies(continued):
    config, books, rows = continued
    assert books.trained_on() == epochs(6 * 16)
    assert {(row["ledger/issued"], row["ledger/trained"]) for row in rows} == {(16, 16)}
    events = [event["event"] for event in read_journal(config.run.folder)]
    assert "lost" in events
    assert "recovered" in events


@pytest.mark.slow
def test_every_role_tells_its_peak_memory(continued):
    _, _, rows = continued
    for role in ("policy", "rollout", "reward"):
        assert 0.05 < rows[-1][f"memory/{role}_gib"] < rows[-1]["memory/limit_gib"]
    assert not any("device" in name for name in rows[-1] if name.startswith("memory/"))


@pytest.mark.slow
def test_old_tokens_are_weighed_against_their_sampler(continued):
    _, _, rows = continued
    assert all("sampling/importance_sampling_ratio/mean" in row for row in rows)


@pytest.mark.slow
def test_cut_responses_begin_again_so_that_each_is_of_one_version(tmp_path):
    _, books, rows = run(tmp_path, "async.max_staleness=1", "async.on_update=cut", "run.steps=4", "evaluation.enabled=false")
    assert 0 < max(row["sampling/staleness/max"] for row in rows) <= 1
    assert all(len(set(tokens.tolist())) == 1 for versions in books.versions.values() for tokens in versions)
    assert books.trained_on() == epochs(4 * 16)


@pytest.mark.slow
def test_agents_with_tools_go_on_over_an_update_and_each_token_has_the_version_that_sampled_it(tmp_path):
    pytest.importorskip("vllm")
    updated, steps = tmp_path / "updated", 2
    _, books, rows = run(
        tmp_path,
        *tool_agent("over_an_update", first=16, file=str(updated)),
        "rollout.mismatch_alarm=0.01",
        "async.max_staleness=1",
        f"run.steps={steps}",
        books=Books(1, lambda trainer: updated.touch()),
    )
    versions = {step: [tokens.clip(0) for tokens in found] for step, found in books.versions.items()}
    assert all((tokens == 0).all() for tokens in versions[1])
    assert all(tokens[-1] == 1 and (np.diff(tokens) >= 0).all() for tokens in versions[2])
    assert any(tokens[0] == 0 for tokens in versions[2])
    assert [row["sampling/staleness/max"] for row in rows] == [0.0, 1.0]
    assert [(row["environment/turns"], row["environment/failed"]) for row in rows] == [(2.0, 0.0)] * steps
    assert books.trained_on() == epochs(steps * 16)


@pytest.mark.nightly
def test_a_run_that_is_stopped_and_one_whose_policy_dies_train_on_every_prompt_once(tmp_path):
    settings = ["async.max_staleness=1", "run.steps=4", "evaluation.enabled=false", "checkpoint.every=1"]
    first = Books(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        run(tmp_path, *settings, books=first)
    second = Books(3, kill("policy"))
    run(tmp_path, *settings, books=second)
    assert sorted(second.prompts) == [3, 4]
    first.prompts |= second.prompts
    assert first.trained_on() == epochs(4 * 16)
