"""The order in which the maths is applied, held to TRL's recorded steps under the two presets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.errors import UserError
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.rollout_collector import forward_passes
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.ppo.update_objectives import make_objectives, plan_update
from rayrlhf.rewards.score import RewardBatch
from tests.fixtures.oracle_cases import classic_case, modern_case

REQUIRED = ["model.path=builtin:tiny", "reward.functions=[{name: length}]", "data.train.path=prompts.jsonl"]


def load(*overrides):
    return load_config(PPOConfig, None, [*REQUIRED, *overrides])


def trimmed(tensor, lengths):
    return [row[:length].tolist() for row, length in zip(tensor, lengths, strict=True)]


def scored(responses, stopped, scores, policy, reference, values, readers=("policy", "policy")):
    """Rollouts with given log-probs and values; prompts are one token long, since nothing here reads them."""
    prompt = np.zeros(1, dtype=np.int32)
    rollouts = [
        Rollout(
            key=SampleKey(0, index, 0),
            prompt_ids=prompt,
            response_ids=np.asarray(response, dtype=np.int32),
            action_mask=np.ones(len(response), dtype=np.bool_),
            logprobs=np.asarray(policy[index], dtype=np.float32),
            versions=np.zeros(len(response), dtype=np.int32),
            finish_reason="stop" if stopped[index] else "length",
            text="",
            seed=0,
        )
        for index, response in enumerate(responses)
    ]
    own, value_reader = readers
    forward_passes = {
        "reference": [TokenScores(logprobs=np.asarray(row, np.float32)) for row in reference],
        own: [
            TokenScores(logprobs=np.asarray(row, np.float32), values=np.asarray(value, np.float32))
            for row, value in zip(policy, values, strict=True)
        ],
    }
    if value_reader != own:
        forward_passes[value_reader] = [TokenScores(values=np.asarray(value, np.float32)) for value in values]
    prompts = {index: Prompt(index, "", prompt) for index in range(len(rollouts))}
    return ScoredRollouts(tuple(rollouts), RewardBatch(np.asarray(scores, np.float32), {}), forward_passes, prompts)


@pytest.mark.parametrize("name", ["base_kl_adaptive", "adam_default", "mse_fixed_accum_gamma"])
def test_the_classic_preset_gives_the_advantages_returns_and_coefficients_that_trl_recorded(name):
    case = classic_case(name)
    config = case.config
    kl = {"kl": "k1", "mse": "k2"}[config["kl_penalty"]]
    maker = ExperienceMaker(
        load(
            "preset=trl-classic",
            "rollout.prompts_per_step=8",
            "train.mini_batch_size=4",
            f"algorithm.kl.estimator={kl}",
            f"algorithm.kl.coefficient={config['init_kl_coef']}",
            f"algorithm.kl.target={config['target'] if config['adap_kl_ctrl'] else 'null'}",
            f"algorithm.kl.horizon={int(config['horizon'])}",
            f"algorithm.advantage.gamma={config['gamma']}",
            f"algorithm.advantage.lam={config['lam']}",
        )
    )
    for step in case.steps:
        lengths = step.response_lengths.tolist()

        def cut(tensor, step=step, lengths=lengths):
            return trimmed(step.to_response(tensor), lengths)

        # The value after the last token is not used by TRL classic: any number may stand there.
        values = [[*row, 7.0] for row in cut(step.old_values_raw)]
        rows = scored(cut(step.mask), [True] * 8, step.scores, cut(step.old_logprobs), cut(step.ref_logprobs), values)
        assert maker.kl_coefficient == pytest.approx(step.kl_coef_before, abs=2e-6)
        experience = maker.make(rows)
        arrays = experience.batch.arrays
        for key, recorded in {"advantages": step.advantages, "returns": step.returns}.items():
            expected = torch.where(step.to_response(step.mask).bool(), step.to_response(recorded), 0.0)
            torch.testing.assert_close(torch.from_numpy(arrays[key]), expected, atol=2e-6, rtol=0)
        assert maker.kl_coefficient == pytest.approx(step.kl_coef_after, abs=2e-6)
        assert experience.metrics["objective/kl"] == pytest.approx(step.statistics["objective/kl"], abs=1e-5)


def test_the_modern_preset_gives_the_advantages_that_trl_recorded():
    case = modern_case("v2_k1_eos_penalty")
    maker = ExperienceMaker(
        load(
            "preset=trl-modern",
            f"rollout.prompts_per_step={len(case.queries)}",
            f"train.mini_batch_size={len(case.queries)}",
            f"rollout.max_new_tokens={case.config['response_length']}",
            f"algorithm.shaping.missing_eos_penalty={case.config['missing_eos_penalty']}",
        )
    )
    lengths = case.advantages_mask.sum(1).tolist()
    responses = case.query_responses[:, case.prompt_width :]
    stopped = [bool((row[:length] == case.eos_token_id).any()) for row, length in zip(responses, lengths, strict=True)]
    values = case.full_value[:, case.prompt_width - 1 :]
    taken = [row[: length + 1].tolist() for row, length in zip(values, lengths, strict=True)]
    rows = scored(
        trimmed(responses, lengths),
        stopped,
        case.scores_raw,
        trimmed(case.rollout_logprobs, lengths),
        trimmed(case.ref_logprobs, lengths),
        taken,
        readers=("policy", "critic"),
    )
    experience = maker.make(rows)
    advantages = torch.from_numpy(experience.batch.arrays["advantages"])
    width = advantages.shape[1]
    expected = torch.where(case.advantages_mask, case.advantages_whitened, 0.0)[:, :width]
    torch.testing.assert_close(advantages, expected, atol=2e-6, rtol=0)
    for name in ("objective/kl", "objective/scores", "objective/non_score_reward", "objective/rlhf_reward"):
        assert experience.metrics[name] == pytest.approx(case.metrics[name], abs=2e-6)


def test_the_gap_between_trainer_and_sampler_is_measured_on_sampled_tokens_only():
    rows = scored(
        [[1, 2], [3]], [True, True], [0.0, 0.0], [[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0]], [[0.0] * 3, [0.0] * 2]
    )
    shifted = [TokenScores(logprobs=row.logprobs + 0.5, values=row.values) for row in rows.forward_passes["policy"]]
    moved = ScoredRollouts(rows.rollouts, rows.rewards, {**rows.forward_passes, "policy": shifted}, rows.prompts)
    config = load("critic.kind=shared", "rollout.prompts_per_step=2")
    assert ExperienceMaker(config).make(rows).metrics[LOGPROB_GAP] == 0.0
    assert ExperienceMaker(config).make(moved).metrics[LOGPROB_GAP] == pytest.approx(0.5)


def test_a_resumed_maker_continues_with_the_same_coefficient_and_moments():
    config = load("preset=trl-classic", "rollout.prompts_per_step=2", "train.mini_batch_size=2", "algorithm.shaping.scale=true")
    rows = scored(
        [[1, 2], [3]], [True, True], [1.0, 3.0], [[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]], [[0.0] * 3, [0.0] * 2]
    )
    first = ExperienceMaker(config)
    first.make(rows)
    second = ExperienceMaker(config)
    second.load_state_dict(first.state_dict())
    ours, theirs = first.make(rows), second.make(rows)
    np.testing.assert_array_equal(ours.batch.arrays["advantages"], theirs.batch.arrays["advantages"])
    assert ours.metrics == theirs.metrics


def two_prompts(scores, policy_shift=0.0):
    """Two responses to each of two prompts, 2 to 4 tokens of at most 4; the last one was cut off by the limit."""
    responses = [[1, 2], [3, 4, 5], [6, 7], [8, 9, 8, 9]]
    logprobs = [[-1.0] * len(response) for response in responses]
    shifted = [[value + policy_shift for value in row] for row in logprobs]
    rows = scored(responses, [True, True, True, False], scores, logprobs, logprobs, [[0.0] * 5] * 4)
    keys = [SampleKey(0, index // 2, index % 2) for index in range(4)]
    rollouts = tuple(replace(rollout, key=key) for rollout, key in zip(rows.rollouts, keys, strict=True))
    policy = [TokenScores(logprobs=np.asarray(row, np.float32)) for row in shifted]
    return ScoredRollouts(rollouts, rows.rewards, {"policy": policy}, rows.prompts)


GROUPED = [
    "algorithm.advantage.estimator=grpo", "algorithm.kl.coefficient=0", "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=2", "rollout.max_new_tokens=4",
]  # fmt: skip


def test_responses_are_compared_with_those_to_the_same_prompt_and_no_critic_is_fed():
    experience = ExperienceMaker(load(*GROUPED)).make(two_prompts([1.0, 3.0, 5.0, 5.0]))
    half = 1 / (np.sqrt(2) + 1e-4)
    assert experience.batch.arrays["advantages"][:, 0].tolist() == pytest.approx([-half, half, 0.0, 0.0])
    assert set(experience.batch.arrays) == {"rollout_logprobs", "advantages", "action_mask"}
    assert experience.metrics["frac_reward_zero_std"] == 0.5
    assert experience.learnable == [0, 1, 2, 3]


def test_a_response_that_was_cut_off_is_not_learned_from_but_counts_in_its_group():
    maker = ExperienceMaker(load(*GROUPED, "algorithm.shaping.truncated=mask", "algorithm.advantage.estimator=dr_grpo"))
    experience = maker.make(two_prompts([1.0, 3.0, 5.0, 7.0]))
    assert experience.learnable == [0, 1, 2]
    assert not experience.batch.arrays["action_mask"][3].any()
    assert experience.batch.arrays["advantages"][2, 0] == -1.0
    plan = plan_update(experience.learnable, 2, 2, run_seed=0, step=0)
    assert [sorted(row for rows in epoch for row in rows) for epoch in plan.epochs] == [[0, 1, 2]] * 2


def test_length_costs_before_the_limit_cuts_off():
    settings = ["algorithm.shaping.overlong_buffer=2", "algorithm.shaping.overlong_penalty=3"]
    experience = ExperienceMaker(load(*GROUPED, *settings, "algorithm.advantage.estimator=rloo")).make(two_prompts([0.0] * 4))
    assert experience.metrics["objective/scores"] == pytest.approx((0 - 1.5 + 0 - 3.0) / 4)
    assert experience.batch.arrays["advantages"][:, 0].tolist() == pytest.approx([1.5, -1.5, 3.0, -3.0])


@pytest.mark.parametrize(
    ("level", "weights"), [("none", None), ("token", [1.5] * 4), ("sequence", [1.5**2, 1.5**3, 1.5**2, 4])]
)
def test_the_samplers_logprobs_are_corrected_where_asked_for(level, weights):
    settings = [f"algorithm.off_policy_correction.level={level}", "algorithm.off_policy_correction.high=4"]
    config = load(*GROUPED, *settings)
    experience = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 5.0], policy_shift=float(np.log(1.5))))
    assert make_objectives(config)["policy"].importance == (weights is not None)
    assert ("importance_weights" in experience.batch.arrays) == (weights is not None)
    if weights is not None:
        assert experience.batch.arrays["importance_weights"][:, 0].tolist() == pytest.approx(weights)
        assert experience.metrics["sampling/importance_bounded"] == pytest.approx(4 / 11 if level == "sequence" else 0.0)


def test_a_greedy_response_pays_for_its_length_as_the_others_do_and_is_the_baseline_of_its_prompt():
    settings = [
        "algorithm.advantage.estimator=remax",
        "algorithm.shaping.missing_eos_penalty=1",
        "rollout.samples_per_prompt=2",
    ]
    rows = two_prompts([1.0, 3.0, 5.0, 5.0])
    # The greedy responses stand in the opposite order; the second prompt's was cut off.
    taken = [replace(rows.rollouts[3], key=SampleKey(0, 1, 2**20)), replace(rows.rollouts[0], key=SampleKey(0, 0, 2**20))]
    greedy = ScoredRollouts(tuple(taken), RewardBatch(np.asarray([4.0, 2.0], np.float32), {}), {}, rows.prompts)
    experience = ExperienceMaker(load(*GROUPED, *settings)).make(replace(rows, greedy=greedy))
    assert experience.batch.arrays["advantages"][:, 0].tolist() == pytest.approx([-1.0, 1.0, 2.0, 1.0])


def test_own_rewards_replace_the_configured_ones_and_change_the_advantages_as_the_estimator_says():
    maker, given = ExperienceMaker(load(*GROUPED)), two_prompts([9.0, 9.0, 9.0, 9.0])
    own = maker.make(given.with_rewards([1.0, 0.0, 0.0, 1.0]))
    configured = ExperienceMaker(load(*GROUPED)).make(two_prompts([1.0, 0.0, 0.0, 1.0]))
    assert own.batch.arrays["advantages"].tolist() == configured.batch.arrays["advantages"].tolist()
    assert own.batch.arrays["advantages"].any()
    assert not maker.make(given).batch.arrays["advantages"].any()


def test_own_rewards_per_token_are_credited_at_their_tokens():
    given = two_prompts([0.0, 0.0, 0.0, 0.0])
    rows = [[float(index == 0) for index in range(len(rollout.response_ids))] for rollout in given.rollouts]
    replaced = given.with_rewards(rows)
    assert replaced.rewards.scores.tolist() == [1.0] * 4
    assert [row.tolist() for row in replaced.rewards.tokens] == rows
    assert replaced.rewards.parts["loop"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ([], "skipped"),
        (["train.mini_batch_size=2"], "recomputed"),
        (["train.epochs=2"], "recomputed"),
        (["algorithm.kl.coefficient=0.1"], "recomputed"),
        (["algorithm.kl={coefficient: 0.1, placement: loss}"], "skipped"),
        (["algorithm.off_policy_correction.level=token"], "recomputed"),
        (["async.max_staleness=1"], "recomputed"),
        (["algorithm.advantage.estimator=gae", "critic.kind=shared"], "recomputed"),
        (["algorithm.advantage.estimator=gae", "critic.kind=separate"], "skipped"),
        (["algorithm.old_logprobs=recomputed"], "recomputed"),
        (["algorithm.old_logprobs=rollout", "train.epochs=2"], "rollout"),
    ],
)
def test_the_policy_reads_rollouts_before_its_update_only_where_something_needs_it(settings, source):
    config = load(*GROUPED, *settings)
    passes = {part.name: part.outputs for part in forward_passes(config, has_critic=config.critic.kind == "separate")}
    assert config.old_logprobs == source
    assert ("logprobs" in passes.get("policy", ())) == (source == "recomputed")
    assert make_objectives(config)["policy"].outputs >= {"logprobs"}


def test_the_engines_logprobs_stand_in_for_recomputed_ones():
    config = load(*GROUPED, "algorithm.old_logprobs=rollout", "train.epochs=2", "algorithm.kl.coefficient=0.5")
    given = two_prompts([1.0, 3.0, 5.0, 5.0])
    reference = [TokenScores(logprobs=rollout.logprobs - 1) for rollout in given.rollouts]
    experience = ExperienceMaker(config).make(replace(given, forward_passes={"reference": reference}))
    arrays = experience.batch.arrays
    np.testing.assert_array_equal(arrays["old_logprobs"], arrays["rollout_logprobs"])
    assert experience.metrics["objective/kl"] == pytest.approx((2 + 3 + 2 + 4) / 4)
    assert LOGPROB_GAP not in experience.metrics  # measured in the update


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.off_policy_correction.level=token"], "off_policy_correction has no effect"),
        (["async.max_staleness=1"], "would hide a lost weight sync"),
    ],
)
def test_logprobs_of_the_engine_are_refused_where_they_mislead(settings, message):
    with pytest.raises(UserError, match=message):
        load(*GROUPED, "algorithm.old_logprobs=rollout", *settings)
