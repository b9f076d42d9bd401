"""Every number of TRL 1.12.0's recorded updates that needs no model, from the functions of `rayrlhf.algorithms` alone."""

from functools import cache

import pytest
import torch

from rayrlhf.algorithms.advantages import estimate_advantages
from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.kl import kl_penalty
from rayrlhf.algorithms.losses import TokenLoss, clipped_value_loss
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSSES
from rayrlhf.algorithms.policy_losses import LossInputs
from rayrlhf.algorithms.reward_shaping import TokenRewards, penalize_missing_stop, token_rewards
from rayrlhf.algorithms.statistics import length_statistics, objective_statistics
from tests.fixtures.oracle_cases import MODERN_NAMES, ModernCase, modern_case

TOLERANCE = 1.2e-6

every_case = pytest.mark.parametrize("name", MODERN_NAMES)


def close(actual: torch.Tensor | float, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), atol=TOLERANCE, rtol=TOLERANCE, check_dtype=False
    )


def response_of(case: ModernCase) -> torch.Tensor:
    return case.query_responses[:, case.prompt_width :]


def stopped_of(case: ModernCase) -> torch.Tensor:
    return (response_of(case) == case.eos_token_id).any(1)


def values_of(case: ModernCase) -> torch.Tensor:
    """Values before each response token, [B, N]."""
    return case.full_value[:, case.prompt_width - 1 : -1]


@cache
def our_scores(name: str) -> torch.Tensor:
    case = modern_case(name)
    return penalize_missing_stop(case.scores_raw, stopped_of(case), case.config["missing_eos_penalty"])


@cache
def our_rewards(name: str) -> TokenRewards:
    case = modern_case(name)
    kl = kl_penalty(case.rollout_logprobs, case.ref_logprobs, case.config["kl_estimator"])
    return token_rewards(kl, our_scores(name), case.advantages_mask, case.config["kl_coef"], position="after_last")


def our_advantages(name: str, *, whitened: bool) -> Advantages:
    case = modern_case(name)
    inputs = AdvantageInputs(
        rewards=our_rewards(name).rewards,
        scores=our_scores(name),
        groups=torch.arange(len(case.scores_raw)),
        mask=case.advantages_mask,
        value_mask=our_rewards(name).value_mask,
        values=values_of(case),
    )
    return estimate_advantages(
        "gae", inputs, gamma=case.config["gamma"], lam=case.config["lam"], skip_masked=True, whitened=whitened
    )


@cache
def our_policy_losses(name: str) -> list[tuple[TokenLoss, torch.Tensor]]:
    case = modern_case(name)
    token_loss = []
    for batch in case.micro_batches:
        rows = batch.indices
        mask = case.advantages_mask[rows]
        loss = POLICY_LOSSES["ppo"](
            LossInputs(batch.logprobs, case.rollout_logprobs[rows], case.advantages_whitened[rows], mask),
            clip_low=case.config["cliprange"],
            clip_high=case.config["cliprange"],
            dual_clip=None,
        )
        token_loss.append((loss, mask))
    return token_loss


@every_case
def test_the_action_mask_ends_with_the_stop_token(name: str) -> None:
    case = modern_case(name)
    stops = response_of(case) == case.eos_token_id
    assert torch.equal(case.advantages_mask, stops.cumsum(1) - stops.int() == 0)


@every_case
def test_rollout_logprobs_are_those_of_the_generation_scores(name: str) -> None:
    case = modern_case(name)
    logprobs = case.generation_scores.log_softmax(-1).gather(2, response_of(case)[..., None]).squeeze(-1)
    close(logprobs[case.advantages_mask], case.rollout_logprobs[case.advantages_mask])


@every_case
def test_the_score_lands_one_slot_after_the_stop_token(name: str) -> None:
    case = modern_case(name)
    rewards = our_rewards(name)
    slots = (rewards.rewards - rewards.non_score).abs().argmax(1)
    lengths = case.advantages_mask.sum(1)
    assert torch.equal(slots, torch.where(lengths < case.config["response_length"], lengths, lengths - 1))


@every_case
def test_advantages_match_before_and_after_whitening(name: str) -> None:
    case = modern_case(name)
    mask = case.advantages_mask
    close(our_advantages(name, whitened=False).advantages[mask], case.advantages_before_whitening[mask])
    close(our_advantages(name, whitened=True).advantages[mask], case.advantages_whitened[mask])


@every_case
def test_policy_losses_of_each_micro_batch_match(name: str) -> None:
    for batch, (token_loss, mask) in zip(modern_case(name).micro_batches, our_policy_losses(name), strict=True):
        close(token_loss.loss.sum() / mask.sum(), batch.statistics["policy_loss"])


@pytest.mark.parametrize(("name", "micro_batch"), [("v2_k1_eos_penalty", 0), ("v2_k1_eos_penalty", 1), ("v2_last_batch", 0)])
def test_value_losses_match_while_the_critic_is_the_recorded_one(name: str, micro_batch: int) -> None:
    case = modern_case(name)
    batch = case.micro_batches[micro_batch]
    rows = batch.indices
    mask = our_rewards(name).value_mask[rows]
    returns = our_advantages(name, whitened=False).returns
    assert returns is not None
    token_loss = clipped_value_loss(values_of(case)[rows], values_of(case)[rows], returns[rows], mask, clip=0.2)
    close(2 * token_loss.loss.sum() / mask.sum(), batch.statistics["value_loss_unhalved"])
    close(token_loss.sums()["ppo/val/error"] / mask.sum(), batch.statistics["value_loss_unhalved"])
    close(token_loss.sums()["val/clipfrac_avg"] / mask.sum(), batch.statistics["value_clipfrac"])


@every_case
def test_objective_metrics_match(name: str) -> None:
    case = modern_case(name)
    kl = kl_penalty(case.rollout_logprobs, case.ref_logprobs, case.config["kl_estimator"])
    ours = objective_statistics(case.rollout_logprobs, kl, our_rewards(name).non_score, our_scores(name), case.advantages_mask)
    for key in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores"):
        close(ours[f"objective/{key}"], case.metrics[f"objective/{key}"])
    lengths = length_statistics((case.queries != case.pad_token_id).sum(1), case.advantages_mask.sum(1), stopped_of(case))
    assert lengths["val/num_eos_tokens"] == case.metrics["val/num_eos_tokens"]


@every_case
def test_update_metrics_match(name: str) -> None:
    case = modern_case(name)
    token_loss = our_policy_losses(name)
    slots = token_loss[0][1].numel()

    def average(key: str) -> float:
        return sum(float(loss.sums()[key] / mask.sum()) for loss, mask in token_loss) / len(token_loss)

    close(average("loss/policy_avg"), case.metrics["loss/policy_avg"])
    close(average("policy/clipfrac_avg"), case.metrics["policy/clipfrac_avg"])
    # TRL averages these two over all slots, where slots behind the mask count as ratio 1.
    close(
        sum(float(loss.sums()["policy/approxkl_avg"]) for loss, _ in token_loss) / slots / len(token_loss),
        case.metrics["policy/approxkl_avg"],
    )
    ratios = torch.stack([(loss.sums()["val/ratio"] + (~mask).sum()) / slots for loss, mask in token_loss])
    close(ratios.mean(), case.metrics["val/ratio"])
    close(ratios.var(), case.metrics["val/ratio_var"])
    value_losses = [0.5 * batch.statistics["value_loss_unhalved"] for batch in case.micro_batches]
    close(sum(value_losses) / len(value_losses), case.metrics["loss/value_avg"])
