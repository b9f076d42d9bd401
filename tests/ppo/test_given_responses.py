"""Responses of the dataset in place of the policy's own: which steps, which tokens, and what is refused."""

import numpy as np
import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.given_responses import check_given_responses, given_rollouts, is_given_step, response_encoder
from rayrlhf.ppo.rollout_collector import make_requests

REQUIRED = ["preset=gkd", "model.path=builtin:tiny", "teacher.model.path=builtin:tiny", "data.train.path=prompts.jsonl"]
MIXED = ["teacher.divergence.student_share=0.25", "teacher.divergence.response_field=answer"]


def load(*overrides):
    return load_config(PPOConfig, None, [*REQUIRED, "reward.functions=[{name: length}]", *overrides])


@pytest.mark.parametrize(("share", "given"), [(1.0, 0), (0.25, 300), (0.0, 400)])
def test_the_share_of_given_steps_is_that_of_the_configuration_and_depends_on_seed_and_step_alone(share, given):
    settings = [f"teacher.divergence.student_share={share}"] + MIXED[1:] * (share < 1)
    found = [is_given_step(load(*settings), step) for step in range(400)]
    assert sum(found) == pytest.approx(given, abs=0 if share in (0, 1) else 30)
    assert found == [is_given_step(load(*settings), step) for step in range(400)]
    if 0 < share < 1:
        assert found != [is_given_step(load(*settings, "run.seed=1"), step) for step in range(400)]


def test_a_given_response_has_its_stop_token_and_is_cut_to_the_longest_response():
    config = load(*MIXED, "rollout.max_new_tokens=4")
    tokenizer = load_tokenizer(config.model)
    prompts = [Prompt(row, "q", np.array([3], np.int32), {"answer": text}) for row, text in enumerate(["12", "123456"])]
    encode = response_encoder(config, tokenizer)
    short, long = given_rollouts(config, prompts, make_requests(prompts, 1, 7, 0), 5, encode)
    whole = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert short.response_ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert (short.finish_reason, long.finish_reason, len(long.response_ids)) == ("stop", "length", 4)
    assert (short.key.step, short.key.prompt, short.versions.tolist()) == (7, 0, [5] * len(short.response_ids))
    assert short.action_mask.all()
    exact = load(*MIXED, f"rollout.max_new_tokens={len(whole) + 1}")
    (ended,) = given_rollouts(exact, prompts[:1], make_requests(prompts[:1], 1, 7, 0), 5, response_encoder(exact, tokenizer))
    assert ended.finish_reason == "stop"


def test_a_row_without_a_response_is_one_line():
    prompts = [Prompt(0, "q", np.array([3], np.int32), {"answer": "1"}), Prompt(1, "q", np.array([3], np.int32), {"other": ""})]
    check_given_responses(load(*MIXED), prompts[:1])
    with pytest.raises(UserError, match=r"teacher\.divergence\.response_field 'answer': row 2 .* its columns are: other"):
        check_given_responses(load(*MIXED), prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["observe.record=light"], "observe.record 'light' cannot hold the teacher's distributions"),
        (["teacher.divergence.student_share=0.5"], "set response_field to their column"),
        (["teacher.divergence.response_field=answer"], "response_field has no effect with student_share 1"),
        ([*MIXED, "rollout.overissue=0.5"], "rollout.overissue 0.5 with teacher.divergence.student_share below 1"),
        (["teacher.discount=0.5"], "discount changes the log-ratio in the advantage, which divergence replaces"),
        (["teacher.clip=1"], "clip changes the log-ratio in the advantage, which divergence replaces"),
        ([*MIXED, "algorithm.advantage.estimator=rloo", "rollout.samples_per_prompt=2"], "possible with .*estimator 'rloo'"),
        ([*MIXED, "algorithm.kl.coefficient=0.1"], "possible with algorithm.kl.coefficient above 0"),
        ([*MIXED, "async.max_staleness=1"], "possible with async.max_staleness above 0"),
        ([*MIXED, "algorithm.old_logprobs=rollout"], "possible with algorithm.old_logprobs 'rollout'"),
        ([*MIXED, "environment.name=guessing"], "possible with an environment"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        load(*settings)
