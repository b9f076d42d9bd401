"""With `rollout.overissue` a step consists of the groups that finish first, each whole."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.generation import Generation
from rayrlhf.ppo.rollout_collector import RequestBuilder, RolloutCollector
from rayrlhf.ppo.sample_ledger import SampleLedger
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.ppo.step_pipeline import OpenStep
from rayrlhf.ppo.whole_groups import WholeGroups
from rayrlhf.rewards.score import RewardBatch
from tests.ppo.runs import run_config
from tests.ppo.test_generation import LateReplica

NOTHING = np.zeros(0, np.int32)


def rollout(prompt, sample, failure=""):
    arrays = NOTHING, NOTHING, NOTHING.astype(bool), NOTHING.astype("f4"), NOTHING
    return Rollout(SampleKey(0, prompt, sample), *arrays, "stop", "", 0, failure=failure)


def names(rollouts):
    return [(one.key.prompt, one.key.sample) for one in rollouts]


def test_the_groups_that_finish_first_are_taken_and_what_follows_is_not_waited_for():
    groups = WholeGroups(prompts=2, samples_per_prompt=2)
    batches = iter([[rollout(5, 0), rollout(6, 1)], [rollout(6, 0), rollout(7, 0)], [rollout(5, 1), rollout(7, 1)], None])
    assert [names(taken) for taken in groups.take(batches)] == [[(6, 1), (6, 0)], [(5, 0), (5, 1)]]
    assert names(groups.rest) == [(7, 0), (7, 1)]  # in the same message, and one too late
    assert next(batches) is None


def test_two_draws_of_a_prompt_are_two_groups_and_a_failed_sample_finishes_its_own():
    groups = WholeGroups(prompts=2, samples_per_prompt=2)
    first = [rollout(5, 0), rollout(5, 2, failure="no answer"), rollout(5, 3)]
    taken = list(groups.take([first, [rollout(5, 1)], [rollout(9, 0)]]))
    assert [names(one) for one in taken] == [[(5, 2), (5, 3)], [(5, 0), (5, 1)]]
    assert groups.rest == []


@given(st.permutations([(prompt, sample) for prompt in range(6) for sample in range(3)]), st.integers(1, 6), st.integers(1, 5))
def test_every_rollout_is_taken_or_left_once_and_groups_in_the_order_of_their_ends(order, prompts, size):
    rollouts = [rollout(*key) for key in order]
    batches = iter([rollouts[start : start + size] for start in range(0, len(rollouts), size)])
    groups = WholeGroups(prompts, 3)
    taken = [key for one in groups.take(batches) for key in names(one)]
    unread = [key for batch in batches for key in names(batch)]
    assert sorted([*taken, *names(groups.rest), *unread]) == sorted(order)
    ends = sorted(range(6), key=lambda prompt: max(order.index((prompt, sample)) for sample in range(3)))
    assert [prompt for prompt, _ in taken] == [prompt for prompt in ends[:prompts] for _ in range(3)]


class Ref(tuple):
    """A result that can be told from an equal one, as Ray's references can."""

    __hash__ = object.__hash__


class Replica(LateReplica):
    """Finishes three responses of two tokens a poll, the last requests first; has ten of the others when it is canceled."""

    def poll(self, minimum, seconds):
        done, self.requests = self.requests[-3:], self.requests[:-3]
        ids = np.array([7, 8], np.int32)
        arrays = ids.astype(bool), ids.astype("f4"), ids
        return Ref(([Rollout(one.key, one.prompt_ids, ids, *arrays, "stop", "", one.seed) for one in done], len(self.requests)))

    def cancel(self):
        return 10


class Scorer:
    """Takes what is to be scored."""

    def __init__(self, prompts):
        self.prompts, self.rollouts = prompts, []

    def add(self, rollouts):
        self.rollouts += rollouts

    def finish(self):
        scores = np.zeros(len(self.rollouts), np.float32)
        return ScoredRollouts(tuple(sorted(self.rollouts, key=lambda one: one.key)), RewardBatch(scores, {}), {}, {})


def test_a_step_scores_its_whole_groups_alone_and_accounts_for_the_others(monkeypatch, tmp_path):
    group = ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "train.mini_batch_size=8"]
    config = run_config(tmp_path, *group, "rollout.overissue=0.5")
    generation = Generation(Replica(monkeypatch, rebuilt=True), lambda _: None, 8, seconds=99, poll_seconds=1.0)
    collector = RolloutCollector(config, None, None, generation, RequestBuilder(config), PhaseTimer())
    monkeypatch.setattr(collector, "scorer", Scorer)
    sampler = PromptSampler([Prompt(number, "", np.array([5], np.int32)) for number in range(20)], seed=0, shuffle=False)
    step = OpenStep(ledger=SampleLedger(3))
    driver = SimpleNamespace(config=config, prompts=sampler.next, steps_done=3, _open=step, _collector=collector)
    driver._begin, driver.step = lambda: None, lambda scored: scored
    scored, ledger = StepDriver.train_step(driver), step.ledger
    # Six prompts were asked for. Nine responses were finished when four groups were: one is of the fifth, and three are open.
    assert names(scored.rollouts) == [(prompt, sample) for prompt in (2, 3, 4, 5) for sample in range(2)]
    assert step.metrics == {
        "sampling/prompts": 6.0,
        "sampling/prompts_left_out": 2.0,
        "sampling/tokens": 16.0 + 2 + 10,
        "sampling/overissued_tokens": 2.0 + 10,
    }
    assert ledger.strict
    ledger.check_scored(scored, sampler.outstanding, 2)
    assert ledger._left_out == {SampleKey(3, prompt, sample): "overissued" for prompt in (0, 1) for sample in range(2)}
    assert generation.vitals() == {"open": 0, "in_flight": {}}
