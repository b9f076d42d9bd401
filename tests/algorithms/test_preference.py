"""The pair loss against its formula written plainly, and against the expression of TRL's trainer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.losses import bradley_terry_loss, centering_loss, preference_loss

rewards = st.floats(-30, 30)
pairs = st.lists(st.tuples(rewards, rewards, st.floats(-3, 3)), min_size=1, max_size=8)


def columns(values):
    return torch.tensor(values, dtype=torch.float64).unbind(1)


@given(pairs)
def test_each_pair_has_the_loss_of_the_formula(values):
    chosen, rejected, margin = columns(values)
    loss = bradley_terry_loss(chosen, rejected, margin)
    centering = centering_loss(chosen, rejected)
    for (better, worse, wanted), found, centred in zip(values, loss.tolist(), centering.tolist(), strict=True):
        assert found == pytest.approx(math.log1p(math.exp(-(better - worse - wanted))), rel=1e-9, abs=1e-12)
        assert centred == pytest.approx((better + worse) ** 2)
    assert torch.equal(bradley_terry_loss(chosen, rejected), bradley_terry_loss(chosen, rejected, torch.zeros_like(margin)))


@given(pairs, st.sampled_from([0.0, 0.01, 0.5]))
def test_the_mean_and_its_gradient_are_trls(values, coefficient):
    ours = [column.clone().requires_grad_() for column in columns(values)[:2]]
    theirs = [column.clone().requires_grad_() for column in columns(values)[:2]]
    margin = columns(values)[2]
    preference_loss(*ours, margin, center_coefficient=coefficient).loss.mean().backward()
    # RewardTrainer.compute_loss of TRL 1.16.
    loss = -torch.nn.functional.logsigmoid(theirs[0] - theirs[1] - margin).mean()
    loss += coefficient * torch.mean((theirs[0] + theirs[1]) ** 2)
    loss.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-12)


def test_rewards_far_apart_lose_neither_loss_nor_gradient():
    chosen = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [2000.0, 0.0]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_statistics_are_per_pair_and_equal_rewards_count_as_wrong():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([0.0, 2.0, 4.0])
    statistics = preference_loss(chosen, rejected).statistics
    assert statistics["accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert statistics["margin"].tolist() == [1.0, 0.0, -1.0]
    assert statistics["mean_reward"].tolist() == [0.5, 2.0, 3.5]
    assert statistics["loss/centering"].tolist() == [1.0, 16.0, 49.0]
    assert not any(values.requires_grad for values in statistics.values())
