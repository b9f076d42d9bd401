"""Every sample of a step reaches its batch once, as it was sampled and with its own reward, or the run ends and names it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrlhf.data.fingerprints import reward_seal
from rayrlhf.data.records import SEGMENT_STRIDE, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.sample_ledger import SampleLedger
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch

STEP, PROMPTS, SAMPLES = 6, 3, 2
PROMPT = np.array([1, 2], np.int32)


def requests(step=STEP):
    return [
        RolloutRequest(SampleKey(step, prompt, sample), PROMPT, 0) for prompt in range(PROMPTS) for sample in range(SAMPLES)
    ]


def rollout(key, tokens=None, **fields):
    response = np.array([key.prompt, key.sample, 7] if tokens is None else tokens, np.int32)
    logprobs, versions = np.zeros(len(response), np.float32), np.zeros(len(response), np.int32)
    return Rollout(key, PROMPT, response, np.ones(len(response), bool), logprobs, versions, "stop", "", 0, **fields)


def sampled():
    return [rollout(request.key) for request in requests()]


def rewarded(rollouts):
    scores = np.arange(len(rollouts), dtype=np.float32)
    seals = [reward_seal(one, float(score), None) for one, score in zip(rollouts, scores, strict=True)]
    return ScoredRollouts(tuple(rollouts), RewardBatch(scores, {}, None, seals), {}, {})


def batch_of(scored, masked=()):
    width = max(len(one.response_ids) for one in scored.rollouts)
    mask = np.zeros((len(scored.rollouts), width), bool)
    for row, one in enumerate(scored.rollouts):
        mask[row, : len(one.action_mask)] = one.action_mask & (row not in masked)
    batch = TrainingBatch([one.sequence() for one in scored.rollouts], {"action_mask": mask})
    return Experience(batch, [one.key for one in scored.rollouts], torch.zeros(len(mask)), {}, torch.zeros(len(mask)))


class Pipeline:
    """A step whose stages a test may harm: what is issued, sampled, scored and in the batch."""

    def __init__(self, *, strict=True):
        self.ledger = SampleLedger(STEP, strict=strict)
        self.issued, self.finished, self.drawn = requests(), sampled(), list(range(PROMPTS))
        self.scored = lambda rollouts: rewarded(rollouts)
        self.batch = batch_of

    def run(self):
        self.ledger.issue(self.issued)
        passed = [one for batch in self.ledger.sampling([self.finished[:2], self.finished[2:]]) for one in batch]
        scored = self.scored([one for one in passed if not one.failure])
        self.ledger.check_scored(scored, self.drawn, SAMPLES)
        return self.ledger.check_batch(self.batch(scored), scored)


def swapped(values, one=1, other=4):
    values = list(values)
    values[one], values[other] = values[other], values[one]
    return values


def swapped_scores(rollouts):
    scored = rewarded(rollouts)
    return replace(scored, rewards=replace(scored.rewards, scores=np.array(swapped(scored.rewards.scores), np.float32)))


def swapped_rows(rollouts):
    scored = rewarded(rollouts)
    rewards = RewardBatch(np.array(swapped(scored.rewards.scores), np.float32), {}, None, swapped(scored.rewards.seals))
    return replace(scored, rewards=rewards)


def other_tokens(rollouts):
    return rewarded([replace(rollouts[0], response_ids=rollouts[1].response_ids), *rollouts[1:]])


def of_another_step(rollouts):
    return rewarded([rollout(rollouts[0].key._replace(step=STEP - 1)), *rollouts[1:]])


def without_greedy(rollouts):
    scored = rewarded(rollouts)
    return replace(scored, greedy=rewarded(rollouts[: 2 * SAMPLES : SAMPLES]))


def lost_row(scored):
    whole = batch_of(scored)
    return replace(whole, batch=whole.batch.select(range(5)), keys=whole.keys[:5])


def exchanged_rows(scored):
    whole = batch_of(scored)
    return replace(whole, batch=whole.batch.select([1, 0, 2, 3, 4, 5]))


def trained_on_foreign_tokens(scored):
    rollouts = (replace(scored.rollouts[0], action_mask=np.array([True, True, False])), *scored.rollouts[1:])
    whole = batch_of(scored)
    assert not np.array_equal(rollouts[0].action_mask, whole.batch.arrays["action_mask"][0])
    scored.rollouts[0].action_mask[-1] = False  # as the environment's token that it is
    return whole


FAULTS = {
    "issued for another step": ({"issued": requests(STEP + 1)}, "sample 0 of prompt 0 was issued for step 8"),
    "issued twice": ({"issued": [*requests(), requests()[3]]}, "sample 1 of prompt 1 was issued twice"),
    "sampled twice": ({"finished": [*sampled(), sampled()[3]]}, "sample 1 of prompt 1 was sampled twice"),
    "sampled unasked": (
        {"finished": [*sampled(), rollout(SampleKey(STEP, 9, 0))]},
        "sample 0 of prompt 9 was sampled and never issued",
    ),
    "lost while sampling": ({"finished": sampled()[:-1]}, "sample 1 of prompt 2 was issued and never sampled"),
    "lost while scoring": (
        {"scored": lambda rollouts: rewarded(rollouts[1:-1])},
        "sample 0 of prompt 0 was sampled and is not in the batch, and 1 more",
    ),
    "doubled": ({"scored": lambda rollouts: rewarded([*rollouts, rollouts[2]])}, "sample 0 of prompt 1 is in the batch twice"),
    "of another step": ({"scored": of_another_step}, "sample 0 of prompt 0 belongs to step 6"),
    "foreign": (
        {"scored": lambda rollouts: rewarded([*rollouts, rollout(SampleKey(STEP, 9, 0))])},
        "sample 0 of prompt 9 was never sampled in it",
    ),
    "other tokens": ({"scored": other_tokens}, "sample 0 of prompt 0 has other tokens than were sampled"),
    "swapped scores": ({"scored": swapped_scores}, "sample 1 of prompt 0 has the reward 4, which was computed for another one"),
    "swapped reward rows": ({"scored": swapped_rows}, "sample 1 of prompt 0 has the reward 4, which was computed for another"),
    "no greedy response": ({"scored": without_greedy}, "sample 0 of prompt 2 is compared with 0 greedy responses, expected 1"),
    "a prompt too few": ({"drawn": [0, 1, 2, 2]}, "sample 0 of prompt 2 belongs to a prompt with 2 samples, expected 4"),
    "a row too few": ({"batch": lost_row}, "6 samples, but 5 rows in the batch"),
    "exchanged rows": ({"batch": exchanged_rows}, "sample 0 of prompt 0 has another sample's row in the batch"),
    "an environment's token": ({"batch": trained_on_foreign_tokens}, "is trained on tokens that the policy did not sample"),
}


@pytest.mark.parametrize(("harm", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_the_step_with_one_line_that_names_step_and_sample(harm, message):
    pipeline = Pipeline()
    for name, value in harm.items():
        setattr(pipeline, name, value)
    with pytest.raises(AlarmError) as caught:
        pipeline.run()
    assert str(caught.value).startswith("step 7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_without_a_fault_counts_what_became_of_its_samples():
    assert Pipeline().run() == {"ledger/issued": 6.0, "ledger/trained": 6.0}


def test_failed_samples_and_those_that_are_masked_as_a_whole_are_counted_and_no_fault():
    pipeline = Pipeline()
    pipeline.finished = [replace(pipeline.finished[0], failure="no answer"), *pipeline.finished[1:]]
    pipeline.batch = lambda scored: batch_of(scored, masked=(3, 4))
    assert pipeline.run() == {"ledger/issued": 6, "ledger/trained": 3, "ledger/failed": 1, "ledger/untrained": 2}


def test_segments_are_samples_of_their_own_that_must_not_get_lost_either():
    pipeline = Pipeline()
    first = pipeline.finished[0]
    segment = rollout(first.key._replace(sample=first.key.sample + SEGMENT_STRIDE), [5])
    pipeline.finished = [replace(first, extra_segments=(segment,)), *pipeline.finished[1:]]
    with pytest.raises(AlarmError, match=f"sample {SEGMENT_STRIDE} of prompt 0 was sampled and is not in the batch"):
        pipeline.run()


def test_zero_variance_groups_are_left_out_and_do_not_come_back():
    ledger, rollouts = SampleLedger(STEP, strict=True), sampled()
    ledger.issue(requests())
    assert list(ledger.sampling([rollouts])) == [rollouts]
    ledger.leave_out(rollouts[:2], "zero_variance")
    scored = rewarded(rollouts[2:])
    ledger.check_scored(scored, range(PROMPTS), SAMPLES)
    assert ledger.check_batch(batch_of(scored), scored)["ledger/zero_variance"] == 2
    with pytest.raises(AlarmError, match=r"sample 0 of prompt 0 was left out \(zero_variance\) and is in the batch"):
        ledger.check_scored(rewarded(rollouts), range(PROMPTS), SAMPLES)


def test_canceled_samples_are_left_out_whether_they_were_finished_or_not():
    ledger, rollouts = SampleLedger(STEP, strict=True), sampled()
    ledger.issue(requests())
    assert list(ledger.sampling([rollouts[:3]])) == [rollouts[:3]]
    ledger.leave_out(rollouts[2:3], "overissued")
    ledger.cancel("overissued")
    scored = rewarded(rollouts[:2])
    ledger.check_scored(scored, range(PROMPTS), SAMPLES)
    counts = ledger.check_batch(batch_of(scored), scored)
    assert (counts["ledger/issued"], counts["ledger/trained"], counts["ledger/overissued"]) == (6, 2, 4)
    with pytest.raises(AlarmError, match="sample 1 of prompt 2 was sampled twice"):
        list(ledger.sampling([rollouts[5:]]))


def test_rewards_of_an_environment_stay_with_their_sample():
    pipeline = Pipeline()
    pipeline.finished = [replace(one, rewards=np.full(3, one.key.prompt, np.float32)) for one in sampled()]
    pipeline.scored = lambda rollouts: rewarded([replace(rollouts[0], rewards=rollouts[-1].rewards), *rollouts[1:]])
    with pytest.raises(AlarmError, match="sample 0 of prompt 0 has other rewards than its environment paid"):
        pipeline.run()


def test_a_loop_of_ones_own_may_drop_samples_and_bring_others_but_use_none_twice():
    pipeline = Pipeline(strict=False)
    own = rollout(SampleKey(STEP - 3, 9, 0))
    pipeline.scored = lambda rollouts: rewarded([*rollouts[1:], own])
    assert pipeline.run() == {"ledger/issued": 6, "ledger/trained": 6, "ledger/dropped_by_loop": 1}
    pipeline = Pipeline(strict=False)
    pipeline.scored = lambda rollouts: rewarded([*rollouts, own, own])
    with pytest.raises(AlarmError, match="sample 0 of prompt 9 is in the batch twice"):
        pipeline.run()
