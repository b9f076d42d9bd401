"""Every number of TRL 0.11.4's recorded steps, from the functions of `rayrlhf.algorithms` alone."""

from functools import cache

import pytest
import torch

from rayrlhf.algorithms.gae import gae
from rayrlhf.algorithms.importance import moved_too_far
from rayrlhf.algorithms.kl import kl_controller, kl_penalty
from rayrlhf.algorithms.losses import TokenLoss, clipped_value_loss
from rayrlhf.algorithms.masking import whiten
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSSES
from rayrlhf.algorithms.policy_losses import LossInputs
from rayrlhf.algorithms.reward_shaping import RunningMoments, TokenRewards, shape_scores, token_rewards
from rayrlhf.algorithms.statistics import (
    explained_variance,
    length_statistics,
    objective_statistics,
    value_statistics,
)
from tests.algorithms.batches import full_kl
from tests.fixtures.oracle_cases import CLASSIC_NAMES, ClassicCase, ClassicStep, classic_case

TOLERANCE = 2e-6
ESTIMATOR_OF_TRL = {"kl": "k1", "abs": "abs", "mse": "k2"}

every_step = pytest.mark.parametrize(("name", "index"), [(name, index) for name in CLASSIC_NAMES for index in (0, 1)])


def close(actual: torch.Tensor | float, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), atol=TOLERANCE, rtol=TOLERANCE, check_dtype=False
    )


def load(name: str, index: int) -> tuple[ClassicCase, ClassicStep, torch.Tensor]:
    case = classic_case(name)
    step = case.steps[index]
    return case, step, step.to_response(step.mask).bool()


@cache
def our_rewards(name: str, index: int) -> TokenRewards:
    _, step, mask = load(name, index)
    return token_rewards(step.to_response(step.kls), step.scores_used, mask, step.kl_coef_before)


@cache
def our_advantages(name: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    case, step, mask = load(name, index)
    advantages, returns = gae(
        our_rewards(name, index).rewards,
        step.to_response(step.old_values_raw),
        mask,
        gamma=case.config["gamma"],
        lam=case.config["lam"],
        skip_masked=False,
    )
    return whiten(advantages, mask), returns


@cache
def our_losses(name: str, index: int) -> list[tuple[TokenLoss, TokenLoss, torch.Tensor]]:
    """Policy terms, value terms and mask of each recorded mini-batch."""
    case, step, _ = load(name, index)
    losses = []
    for mini_batch in step.mini_batches:
        rows = mini_batch.indices
        mask = step.to_response(step.mask[rows], rows).bool()
        cut = {
            field: step.to_response(getattr(step, field)[rows], rows)
            for field in ("old_logprobs", "advantages", "values_masked", "returns")
        }
        policy = POLICY_LOSSES["ppo"](
            LossInputs(step.to_response(mini_batch.logprobs, rows), cut["old_logprobs"], cut["advantages"], mask),
            clip_low=case.config["cliprange"],
            clip_high=case.config["cliprange"],
            dual_clip=None,
        )
        assert mini_batch.values is not None
        value = clipped_value_loss(
            step.to_response(mini_batch.values, rows),
            cut["values_masked"],
            cut["returns"],
            mask,
            clip=case.config["cliprange_value"],
        )
        losses.append((policy, value, mask))
    return losses


@every_step
def test_the_mask_covers_the_response_and_nothing_else(name: str, index: int) -> None:
    _, step, mask = load(name, index)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < step.response_lengths[:, None])
    assert int(step.mask.sum()) == int(mask.sum())


@every_step
def test_sampled_kls_match(name: str, index: int) -> None:
    case, step, mask = load(name, index)
    if case.config["kl_penalty"] == "full":
        pytest.skip("needs logits: the next test")
    kls = kl_penalty(step.old_logprobs, step.ref_logprobs, ESTIMATOR_OF_TRL[case.config["kl_penalty"]])
    close(step.to_response(kls)[mask], step.to_response(step.kls)[mask])


def test_the_full_kl_of_two_models_matches() -> None:
    transformers = pytest.importorskip("transformers")
    case, step, mask = load("full_gpt2_scale_only", 0)
    logits = []
    for weights in (case.policy_weights, case.ref_weights):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**case.model_config)).eval()
        model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("v_head.")}, strict=False)
        with torch.no_grad():
            logits.append(model(step.input_ids, attention_mask=step.attention_mask).logits[:, :-1])
    close(step.to_response(full_kl(*logits))[mask], step.to_response(step.kls)[mask])


def test_shaped_scores_and_running_moments_match_over_both_steps() -> None:
    for name in CLASSIC_NAMES:
        case = classic_case(name)
        moments = RunningMoments()
        for step in case.steps:
            shaped = shape_scores(
                step.scores,
                moments,
                scale=case.config["use_score_scaling"],
                center=case.config["use_score_norm"],
                clip=case.config["score_clip"],
            )
            close(shaped, step.scores_used)
            recorded = step.running_moments
            for ours, theirs in (
                (moments.mean, "mean"),
                (moments.std, "std"),
                (moments.variance, "var"),
                (moments.count, "count"),
            ):
                close(ours, recorded[theirs])


@every_step
def test_token_rewards_match(name: str, index: int) -> None:
    _, step, mask = load(name, index)
    ours = our_rewards(name, index)
    close(ours.non_score[mask], step.to_response(step.non_score_reward)[mask])
    close(ours.rewards[mask], step.to_response(step.rewards)[mask])
    assert torch.equal(ours.value_mask, mask)


@every_step
def test_advantages_and_returns_match(name: str, index: int) -> None:
    _, step, mask = load(name, index)
    advantages, returns = our_advantages(name, index)
    close(advantages[mask], step.to_response(step.advantages)[mask])
    close(returns[mask], step.to_response(step.returns)[mask])


@every_step
def test_losses_and_statistics_of_each_mini_batch_match(name: str, index: int) -> None:
    case, step, _ = load(name, index)
    for mini_batch, (policy, value, mask) in zip(step.mini_batches, our_losses(name, index), strict=True):
        theirs, tokens = mini_batch.statistics, mask.sum()
        ours = {key: total / tokens for key, total in (policy.sums() | value.sums()).items()}
        close(policy.loss.sum() / tokens, theirs["loss_policy"])
        close(case.config["vf_coef"] * value.loss.sum() / tokens, theirs["loss_value_times_vf_coef"])
        close(ours["loss/policy_avg"], theirs["loss/policy"])
        close(ours["loss/value_avg"], theirs["loss/value"])
        close(ours["loss/policy_avg"] + case.config["vf_coef"] * ours["loss/value_avg"], theirs["loss/total"])
        close(ours["policy/approxkl_avg"], theirs["policy/approxkl"])
        close(ours["ppo/policy/policykl"], theirs["policy/policykl"])
        close(ours["policy/clipfrac_avg"], theirs["policy/clipfrac"])
        close(ours["ppo/policy/advantages_mean"], theirs["policy/advantages_mean"])
        close(ours["val/clipfrac_avg"], theirs["val/clipfrac"])
        close(ours["ppo/val/error"], theirs["val/error"])
        close(ours["ppo/val/vpred"], theirs["val/vpred"])
        rows = mini_batch.indices
        moments = value_statistics(
            step.to_response(step.values_masked[rows], rows), step.to_response(step.returns[rows], rows), mask
        )
        for key in ("val/mean", "val/var", "returns/mean", "returns/var"):
            close(moments[f"ppo/{key}"], theirs[key])


@every_step
def test_what_the_step_logged_matches(name: str, index: int) -> None:
    _, step, mask = load(name, index)
    kls, theirs = step.to_response(step.kls), step.statistics
    ours = objective_statistics(
        step.to_response(step.old_logprobs), kls, our_rewards(name, index).non_score, step.scores_used, mask
    )
    for key, trl in (
        ("objective/kl", "objective/kl"),
        ("objective/entropy", "objective/entropy"),
        ("objective/scores", "ppo/mean_scores"),
        ("ppo/std_scores", "ppo/std_scores"),
        ("ppo/mean_non_score_reward", "ppo/mean_non_score_reward"),
    ):
        close(ours[key], theirs[trl])
    lengths = length_statistics(step.query_lengths, step.response_lengths, torch.ones(len(mask), dtype=torch.bool))
    for key in ("queries_len_mean", "queries_len_std", "responses_len_mean", "responses_len_std"):
        close(lengths[f"tokens/{key}"], theirs[f"tokens/{key}"])


@every_step
def test_update_metrics_are_means_over_the_mini_batches(name: str, index: int) -> None:
    _, step, _ = load(name, index)
    means: dict[str, list[float]] = {}
    for policy, value, mask in our_losses(name, index):
        for key, total in (policy.sums() | value.sums()).items():
            means.setdefault(key, []).append(float(total / mask.sum()))
    return_variances = [
        value_statistics(
            step.values_masked[mini_batch.indices], step.returns[mini_batch.indices], step.mask[mini_batch.indices].bool()
        )
        for mini_batch in step.mini_batches
    ]
    average = {key: sum(values) / len(values) for key, values in means.items()}
    return_variance = sum(moments["ppo/returns/var"] for moments in return_variances) / len(return_variances)
    theirs = step.statistics
    for key, trl in (
        ("loss/policy_avg", "ppo/loss/policy"),
        ("loss/value_avg", "ppo/loss/value"),
        ("policy/approxkl_avg", "ppo/policy/approxkl"),
        ("policy/clipfrac_avg", "ppo/policy/clipfrac"),
        ("ppo/policy/policykl", "ppo/policy/policykl"),
        ("val/clipfrac_avg", "ppo/val/clipfrac"),
        ("ppo/val/error", "ppo/val/error"),
        ("ppo/val/vpred", "ppo/val/vpred"),
    ):
        close(average[key], theirs[trl])
    close(explained_variance(average["ppo/val/error"], return_variance), theirs["ppo/val/var_explained"])


@pytest.mark.parametrize("name", CLASSIC_NAMES)
def test_the_coefficient_follows_the_recorded_path(name: str) -> None:
    config = classic_case(name).config
    target = config["target"] if config["adap_kl_ctrl"] else None
    controller = kl_controller(config["init_kl_coef"], target, config["horizon"])
    for step in classic_case(name).steps:
        close(controller.value, step.kl_coef_before)
        kl = objective_statistics(step.old_logprobs, step.kls, step.non_score_reward, step.scores_used, step.mask.bool())
        controller.update(kl["objective/kl"], samples=config["batch_size"])
        close(controller.value, step.kl_coef_after)


def test_early_stopping_ends_the_steps_where_they_ended() -> None:
    case = classic_case("early_stop")
    size = case.config["batch_size"] // case.config["mini_batch_size"]
    for index, step in enumerate(case.steps):
        last_of_epoch = [
            float(policy.sums()["ppo/policy/policykl"] / mask.sum()) for policy, _, mask in our_losses(case.name, index)
        ][size - 1 :: size]
        decisions = [moved_too_far(policy_kl, case.config["target_kl"]) for policy_kl in last_of_epoch]
        assert decisions == [False] * (len(step.permutations) - 1) + [True]
