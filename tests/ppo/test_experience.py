"""The order in which the maths is applied, held to TRL's recorded steps under the two presets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.engines.objectives.policy import divergence_beta
from rayrlhf.errors import AlarmError, UserError
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


def test_the_critics_targets_are_whole_returns_in_pretraining_and_those_of_its_lambda_after_it():
    own = ["critic.kind=separate", "critic.pretrain_steps=1", "algorithm.kl.coefficient=0", "algorithm.advantage.lam=1"]
    maker = ExperienceMaker(load(*own, "algorithm.advantage.critic_lam=0", "algorithm.advantage.whiten=false"))
    logprobs = [[-1.0, -1.0]]
    rows = scored([[1, 2]], [True], [3.0], logprobs, logprobs, [[0.25, 0.5, 0.0]], readers=("policy", "critic"))
    later = replace(rows, rollouts=tuple(replace(rollout, key=SampleKey(1, 0, 0)) for rollout in rows.rollouts))
    found = [maker.make(step).batch.arrays for step in (rows, later)]
    assert [arrays["returns"][0, :2].tolist() for arrays in found] == [[3.0, 3.0], [0.5, 3.0]]
    assert [arrays["advantages"][0].tolist() for arrays in found] == [[2.75, 2.5]] * 2


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
    assert experience.learnable_groups == [[0, 1], [2]]
    assert not experience.batch.arrays["action_mask"][3].any()
    assert experience.batch.arrays["advantages"][2, 0] == -1.0
    plan = plan_update(experience.learnable_groups, 2, 2, run_seed=0, step=0)
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


@pytest.mark.parametrize(
    ("rejection", "weights"), [("geometric", [0.0] * 4), ("product", [1.0, 0.0, 1.0, 0.0]), ("outlier", [1.0] * 4)]
)
def test_responses_outside_the_bounds_are_rejected_whole(rejection, weights):
    # Every token's ratio is 1.3, and responses have 2, 3, 2 and 4 tokens.
    settings = [f"algorithm.off_policy_correction.rejection={rejection}"]
    config = load(*GROUPED, *settings)
    experience = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 5.0], policy_shift=float(np.log(1.3))))
    assert make_objectives(config)["policy"].importance
    assert experience.batch.arrays["action_mask"].any(1).tolist() == [weight > 0 for weight in weights]
    assert experience.metrics["sampling/responses_rejected"] == weights.count(0.0) / 4


def test_the_tokens_of_a_prompt_share_its_weight_and_those_with_high_covariance_are_marked():
    settings = ["algorithm.policy_loss={name: kl_cov, share: 0.5, loss_aggregation: prompt}"]
    experience = ExperienceMaker(load(*GROUPED, *settings)).make(two_prompts([1.0, 3.0, 5.0, 5.0]))
    arrays = experience.batch.arrays
    assert arrays["prompt_weights"].max(1).tolist() == pytest.approx([2 / 5, 2 / 5, 2 / 6, 2 / 6])
    assert arrays["selected_tokens"].sum() == 5
    clipped = load(*GROUPED, "algorithm.policy_loss={name: clip_cov, share: 0.2, cov_low: -9, cov_high: 9}")
    taken = [ExperienceMaker(clipped).make(two_prompts([1.0, 3.0, 5.0, 5.0])).batch.arrays for _ in range(2)]
    assert taken[0]["selected_tokens"].sum() == 2
    assert np.array_equal(taken[0]["selected_tokens"], taken[1]["selected_tokens"])


def test_the_tokens_of_correct_responses_share_the_weight_of_all():
    # Responses have 2, 3, 2 and 4 tokens. No shaped score is above 0.1.
    for least, expected in ((3, [0, 11 / 9, 11 / 9, 11 / 9]), (9, [0] * 4)):
        loss = f"algorithm.policy_loss={{positive_coefficient: 0.1, right_from: {least}}}"
        config = load(*GROUPED, "algorithm.shaping.clip=0.1", loss)
        arrays = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 5.0])).batch.arrays
        assert arrays["positive_weights"].max(1).tolist() == pytest.approx(expected)
        assert not arrays["positive_weights"][~arrays["action_mask"]].any()


@pytest.mark.parametrize("module", ["", "own.module:", "own/file.py:"])
def test_gdpo_reads_the_values_of_each_reward_function(module):
    settings = [
        "algorithm.advantage.estimator=gdpo",
        f"reward.functions=[{{name: {module}length, weight: 2}}, {{name: {module}word_count, weight: 1}}]",
    ]
    rows = two_prompts([2.0, 2.0, 2.0, 2.0])
    parts = {
        "word_count": np.asarray([0.0, 2.0, 0.0, 0.0], np.float32),
        "length": np.asarray([1.0, 0.0, 1.0, 0.0], np.float32),
    }
    rows = replace(rows, rewards=RewardBatch(rows.rewards.scores, parts))
    advantages = ExperienceMaker(load(*GROUPED, *settings)).make(rows).batch.arrays["advantages"][:, 0]
    half = 1 / (2**0.5 * (1 + 1e-4 * 2**0.5))
    sums = np.array([2 * half - half, half - 2 * half, 2 * half, -2 * half])
    assert advantages.tolist() == pytest.approx((sums / (sums.std(ddof=1) + 1e-4)).tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "alone"), [("distillation", [0.0] * 4), ("dr_grpo", [-1.0, 1.0, 0.0, 0.0])], ids=["alone", "mixed"]
)
def test_a_teacher_adds_its_log_ratio_to_the_advantages_of_any_estimator(estimator, alone):
    settings = ["teacher.model.path=builtin:tiny", "teacher.coefficient=2", f"algorithm.advantage.estimator={estimator}"]
    rows = two_prompts([1.0, 3.0, 5.0, 5.0])
    teacher = [TokenScores(logprobs=np.full(len(rollout.response_ids), -1.25, np.float32)) for rollout in rows.rollouts]
    rows = replace(rows, forward_passes={**rows.forward_passes, "teacher": teacher})
    config = load(*GROUPED, *settings)
    assert config.old_logprobs == "recomputed"
    experience = ExperienceMaker(config).make(rows)
    arrays = experience.batch.arrays
    assert arrays["advantages"][:, 0].tolist() == pytest.approx([one - 0.5 for one in alone])
    assert not arrays["advantages"][~arrays["action_mask"]].any()
    assert experience.metrics["objective/teacher_kl"] == pytest.approx(0.25 * 11 / 4)
    assert experience.metrics["objective/teacher_kl_per_token"] == pytest.approx(0.25)
    (one,) = (forward for forward in forward_passes(config, ("teacher",), has_critic=False) if forward.name == "teacher")
    assert (one.role, one.temperature, one.outputs, one.shares_prefixes) == ("teacher", 1.0, frozenset({"logprobs"}), True)


def test_a_divergence_leaves_the_advantages_alone_and_brings_the_teachers_tokens_to_the_loss():
    settings = ["teacher.model.path=builtin:tiny", "teacher.divergence={beta: 0.3, vocabulary: 2}", "teacher.coefficient=2"]
    config = load(*GROUPED, *settings, "algorithm.advantage.estimator=dr_grpo")
    rows, teacher = two_prompts([1.0, 3.0, 5.0, 5.0]), []
    for rollout in rows.rollouts:
        length = len(rollout.response_ids)
        ids = np.arange(2 * length, dtype=np.int32).reshape(length, 2)
        known = np.log(np.full((length, 3), 1 / 3, np.float32))
        teacher.append(TokenScores(logprobs=np.full(length, -1.25, np.float32), teacher_ids=ids, teacher_logprobs=known))
    experience = ExperienceMaker(config).make(replace(rows, forward_passes={**rows.forward_passes, "teacher": teacher}))
    arrays = experience.batch.arrays
    assert arrays["advantages"][:, 0].tolist() == [-1.0, 1.0, 0.0, 0.0]
    mask = arrays["action_mask"]
    assert arrays["teacher_ids"].shape == (*mask.shape, 2)
    for row, scores in enumerate(teacher):
        assert arrays["teacher_ids"][row, mask[row]].tolist() == scores.teacher_ids.tolist()
    assert arrays["teacher_logprobs"][mask] == pytest.approx(np.log(1 / 3))
    assert experience.metrics["objective/teacher_kl_per_token"] == pytest.approx(0.25)
    (one,) = (forward for forward in forward_passes(config, (), has_critic=False) if forward.name == "teacher")
    assert one.outputs == frozenset({"logprobs", "hidden"})
    objective = make_objectives(config)["policy"]
    assert "divergence" in objective.outputs
    assert divergence_beta(objective) == 0.3
    assert objective.distillation.coefficient == 2


def test_distillation_without_a_teacher_is_one_line():
    with pytest.raises(UserError, match=r"estimator 'distillation' needs a teacher: set teacher\.model\.path"):
        load(*GROUPED, "algorithm.advantage.estimator=distillation")


@pytest.mark.parametrize(
    "key", ["algorithm.shaping.clip=1", "algorithm.shaping.overlong_buffer=2", "reward.given_by_loop=true"]
)
def test_gdpo_refuses_what_it_does_not_read(key):
    with pytest.raises(UserError, match=f"'gdpo' reads the values of reward.functions.* and not {key.split('=')[0]}: remove"):
        load(*GROUPED, "algorithm.advantage.estimator=gdpo", key)


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
    passes = {part.name: part.outputs for part in forward_passes(config, (), has_critic=config.critic.kind == "separate")}
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


@pytest.mark.parametrize(
    ("place", "settings", "named"),
    [
        ("policy", [], "log-prob of the policy"),
        ("policy", ["algorithm.old_logprobs=rollout"], "log-prob of the rollout engine"),
        ("reference", ["algorithm.kl.target=6", "algorithm.kl.coefficient=0.1"], "log-prob of the reference"),
        ("values", [], "value of the critic"),
        ("values", ["critic.kind=shared"], "value of the policy"),
        ("tokens", [], "reward of the token"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_input_is_named_by_role_sample_and_token_and_leaves_no_state(place, settings, named, value):
    rows = {name: -np.random.default_rng(0).random((3, 4)).astype(np.float32) for name in ("policy", "reference", "tokens")}
    rows["values"] = np.zeros((3, 5), np.float32)
    rows[place][1, 2] = value
    config = load("rollout.prompts_per_step=3", "train.mini_batch_size=3", *settings)
    readers = ("policy", "policy" if config.critic.kind == "shared" else "critic")
    arguments = (rows["policy"], rows["reference"], rows["values"], readers)
    given = scored([[5, 6, 7, 8]] * 3, [True] * 3, [0.0, 1.0, 2.0], *arguments)
    if place == "tokens":
        given = replace(given, rewards=RewardBatch(given.rewards.scores, {}, list(rows["tokens"])))
    maker = ExperienceMaker(config)
    before = maker.state_dict()
    experience = maker.make(given)
    assert experience.batch.cause == f"sample 1 (prompt 1, sample 0), token 2, {named}"
    assert place != "reference" or maker.state_dict() == before
    assert experience.batch.select([1]).cause == experience.batch.cause


def test_a_score_that_overflowed_ends_the_run_before_the_running_moments_keep_it():
    row = np.zeros((2, 1), np.float32)
    given = scored([[5], [6]], [True, True], [0.0, np.inf], row, row, np.zeros((2, 2)), ("policy", "critic"))
    maker = ExperienceMaker(load("algorithm.shaping.scale=true"))
    before = maker.state_dict()
    with pytest.raises(AlarmError, match=r"reward: inf for sample 1 \(prompt 1, sample 0\), expected a finite number"):
        maker.make(given)
    assert maker.state_dict() == before


@pytest.mark.parametrize("old", ["recomputed", "rollout"])
def test_tokens_whose_distribution_a_constraint_changed_are_left_out_of_the_loss(old):
    maker = ExperienceMaker(load("rollout.prompts_per_step=2", "train.mini_batch_size=2", f"algorithm.old_logprobs={old}"))
    trainer = [[-1.0, -2.0, -3.0, -0.5], [-1.0, -2.0, -3.0, -0.5]]
    rows = scored([[5] * 4] * 2, [True, True], [1.0, 0.0], trainer, trainer, [[0.0] * 5] * 2, ("policy", "critic"))
    log_z = np.array([0.0, -0.04, -0.06, -2.0], np.float32)  # The engine's log-prob is higher by -log Z.
    engine = rows.rollouts[0].logprobs - log_z
    bent = replace(rows.rollouts[0], logprobs=engine, constrained=np.array([True, True, True, True]))
    experience = maker.make(replace(rows, rollouts=(bent, rows.rollouts[1])))
    kept = [True, True, False, False] if old == "recomputed" else [False] * 4
    assert experience.batch.arrays["action_mask"].tolist() == [kept, [True] * 4]
    if old == "recomputed":
        assert experience.metrics[LOGPROB_GAP] == pytest.approx(0.04 / 6)
