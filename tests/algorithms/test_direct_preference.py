"""The losses of DPO by hand, and what their statistics mean."""

import math

import pytest
import torch

from rayrlhf.algorithms.losses import direct_preference_loss


def softplus(value):
    return math.log1p(math.exp(value))


def random_ratios(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator) * 5, torch.randint(1, 9, (count, 2), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_losses_are_their_formulas_written_out_for_each_pair(smoothing):
    ratios, lengths = random_ratios()
    for name in ("sigmoid", "robust", "ipo"):
        found = direct_preference_loss(ratios, lengths, loss=name, beta=0.3, label_smoothing=smoothing).loss
        for row, ((chosen, rejected), (long, short)) in enumerate(zip(ratios.tolist(), lengths.tolist(), strict=True)):
            margin = 0.3 * (chosen - rejected)
            expected = {
                "sigmoid": (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin),
                "robust": ((1 - smoothing) * softplus(-margin) - smoothing * softplus(margin)) / (1 - 2 * smoothing),
                "ipo": (chosen / long - rejected / short - 1 / 0.6) ** 2,
            }[name]
            assert found[row].item() == pytest.approx(expected, rel=1e-5)


def test_robust_labels_give_the_clean_loss_in_the_mean_over_wrong_labels():
    ratios, lengths = random_ratios()
    clean = direct_preference_loss(ratios, lengths).loss
    right = direct_preference_loss(ratios, lengths, loss="robust", label_smoothing=0.2).loss
    wrong = direct_preference_loss(ratios.flip(1), lengths.flip(1), loss="robust", label_smoothing=0.2).loss
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, clean)


def test_a_policy_that_is_its_reference_has_no_rewards_and_the_loss_of_a_coin():
    token_loss = direct_preference_loss(torch.zeros(3, 2), torch.ones(3, 2))
    torch.testing.assert_close(token_loss.loss, torch.full((3,), math.log(2)))
    assert all(not token_loss.statistics[name].any() for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"))


def test_rewards_are_beta_times_log_ratios_and_stay_finite_where_these_are_huge():
    ratios = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    token_loss = direct_preference_loss(ratios, torch.ones(2, 2), beta=0.5)
    token_loss.loss.sum().backward()
    assert torch.isfinite(token_loss.loss).all()
    assert torch.isfinite(ratios.grad).all()
    assert token_loss.statistics["margin"].tolist() == [1e4, -1e4]
    assert token_loss.statistics["accuracy"].tolist() == [1.0, 0.0]
