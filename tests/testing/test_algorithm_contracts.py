"""Contract tests of losses, estimators and KL kinds accept the built-in ones and name the fault of broken ones."""

from dataclasses import replace

import pytest
import torch

from rayrlhf.algorithms.advantages import ADVANTAGE_ESTIMATORS
from rayrlhf.algorithms.estimator import Advantages
from rayrlhf.algorithms.kl import KL_ESTIMATORS
from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSSES
from rayrlhf.algorithms.policy_losses import ppo_loss
from rayrlhf.testing import check_advantage_estimator, check_kl_estimator, check_policy_loss


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_built_in_loss_keeps_the_contract(name):
    check_policy_loss(name)


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_every_built_in_estimator_keeps_the_contract(name):
    check_advantage_estimator(name)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_every_built_in_kl_kind_keeps_the_contract(name):
    check_kl_estimator(name)


def averaging(inputs):
    loss = ppo_loss(inputs)
    return replace(loss, loss=loss.loss / inputs.mask.sum())


def unmasked(inputs):
    return TokenLoss(-inputs.logprobs * inputs.advantages + 1, {})


def detached(inputs):
    return TokenLoss(-inputs.old_logprobs * inputs.advantages, {})


def noisy(inputs):
    return TokenLoss(-inputs.logprobs * inputs.advantages, {"ratio": torch.where(inputs.mask, inputs.logprobs, 0.0)})


def leaking(inputs):
    lengths = inputs.old_logprobs.shape[1] + inputs.old_logprobs.sum(1, keepdim=True)
    return TokenLoss(torch.where(inputs.mask, -inputs.logprobs * inputs.advantages / lengths, 0.0), {})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (averaging, "must not average"),
        (unmasked, "loss: not 0 outside the mask"),
        (detached, "no gradient"),
        (noisy, "ratio has a gradient"),
        (leaking, "depends on values outside the mask"),
        (lambda inputs: inputs.logprobs, "expected a TokenLoss"),
        ("ppoo", "did you mean 'ppo'"),
    ],
)
def test_a_broken_loss_is_named(loss, message):
    with pytest.raises(AssertionError, match=message):
        check_policy_loss(loss)


def test_an_unknown_argument_of_a_loss_is_named():
    with pytest.raises(AssertionError, match="clip_lo"):
        check_policy_loss("ppo", clip_lo=0.1)


def test_an_estimator_that_changes_its_inputs_is_named():
    def changes(inputs, **options):
        inputs.rewards.mul_(2)
        return Advantages(inputs.broadcast(inputs.sequence_rewards), None)

    with pytest.raises(AssertionError, match="changed its input rewards"):
        check_advantage_estimator(changes)


def test_an_estimator_that_depends_on_the_order_of_responses_is_named():
    def first(inputs, **options):
        return Advantages(inputs.broadcast(inputs.scores - inputs.scores[0]), None)

    with pytest.raises(AssertionError, match="reordering the responses changes"):
        check_advantage_estimator(first)


def test_an_estimator_of_the_wrong_shape_is_named():
    with pytest.raises(AssertionError, match="advantages: shape"):
        check_advantage_estimator(lambda inputs, **options: Advantages(inputs.scores, None))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(lambda d: d + 1, "expected 0"), (lambda d: d - d.mean(), "another KL alone"), (lambda d: d / 0, "not finite")],
)
def test_a_broken_kl_kind_is_named(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_kl_estimator(kind)
