import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.advantages import estimate_advantages
from rayrlhf.algorithms.estimator import AdvantageInputs
from rayrlhf.algorithms.gae import adaptive_lambda, gae
from rayrlhf.errors import UserError
from tests.algorithms.batches import Batch, batches

unit = st.floats(0, 1)


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t as the explicit sum of (gamma lambda)^k delta_{t+k}."""
    following = [*values[1:], 0.0]
    deltas = [reward + gamma * after - value for reward, after, value in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@given(batches(), unit, unit)
def test_actions_see_the_sum_of_discounted_errors_as_if_other_tokens_were_not_there(
    batch: Batch, gamma: float, lam: float
) -> None:
    rewards, values = batch.floats(), batch.floats()
    advantages, returns = gae(batch.behind_nan(rewards), batch.behind_nan(values), batch.mask, gamma=gamma, lam=lam)
    for row, mask in enumerate(batch.mask):
        expected = torch.tensor(by_definition(rewards[row, mask].tolist(), values[row, mask].tolist(), gamma, lam)).double()
        torch.testing.assert_close(advantages[row, mask], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(returns[row, mask], expected + values[row, mask], atol=1e-6, rtol=1e-6)
    assert not advantages[~batch.mask].any()
    assert not returns[~batch.mask].any()


@given(batches(), unit, unit)
def test_unskipped_masked_tokens_are_steps_of_reward_and_value_0(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values = batch.floats(), batch.floats()
    advantages, _ = gae(
        batch.behind_nan(rewards), batch.behind_nan(values), batch.mask, gamma=gamma, lam=lam, skip_masked=False
    )
    for row, mask in enumerate(batch.mask):
        zeroed = (torch.where(mask, tensor[row], 0).tolist() for tensor in (rewards, values))
        expected = torch.tensor(by_definition(*zeroed, gamma, lam)).double()
        torch.testing.assert_close(advantages[row, mask], expected[mask], atol=1e-6, rtol=1e-6)


@given(batches(holes=False), unit, unit)
def test_both_ways_agree_on_masks_without_holes(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values = batch.floats(), batch.floats()
    skipping = gae(rewards, values, batch.mask, gamma=gamma, lam=lam, skip_masked=True)
    stepping = gae(rewards, values, batch.mask, gamma=gamma, lam=lam, skip_masked=False)
    torch.testing.assert_close(skipping, stepping)


@given(batches())
def test_lambda_1_gives_the_reward_to_go_as_return(batch: Batch) -> None:
    rewards = torch.where(batch.mask, batch.floats(), 0)
    _, returns = gae(rewards, batch.floats(), batch.mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[batch.mask], to_go[batch.mask])


@given(batches(holes=False), unit)
def test_lambda_0_gives_the_one_step_error(batch: Batch, gamma: float) -> None:
    rewards, values = batch.floats(), batch.floats()
    advantages, _ = gae(rewards, values, batch.mask, gamma=gamma, lam=0.0)
    after = torch.nn.functional.pad(torch.where(batch.mask, values, 0), (0, 1))[:, 1:]
    torch.testing.assert_close(advantages[batch.mask], (rewards + gamma * after - values)[batch.mask])


@given(batches(), unit)
def test_a_perfect_critic_of_a_constant_leaves_no_advantage_across_masked_spans(batch: Batch, lam: float) -> None:
    # One reward at the end and gamma 1: the true value is that reward before every action.
    end = batch.mask.flip(1).cumsum(1).flip(1).eq(1) & batch.mask
    advantages, _ = gae(0.5 * end.double(), torch.full(batch.mask.shape, 0.5).double(), batch.mask, gamma=1.0, lam=lam)
    assert advantages.abs().max() < 1e-9


def test_masked_spans_give_the_figures_worked_out_by_hand() -> None:
    # Four tokens, the third of a tool, reward 1 at the end, every value 0.5, lambda 0.95.
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.full((1, 4), 0.5)
    mask = torch.tensor([[True, True, False, True]])
    skipping, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(skipping, torch.tensor([[0.45125, 0.475, 0.0, 0.5]]))
    stepping, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95, skip_masked=False)
    # A_3 = .5; A_2 = .5 + .95 * .5 = .975; A_1 = -.5 + .95 * .975 = .42625; A_0 = .95 * .42625.
    torch.testing.assert_close(stepping, torch.tensor([[0.4049375, 0.42625, 0.0, 0.5]]))


@given(batches(), unit, unit)
def test_padding_wider_and_permuting_the_batch_changes_nothing(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values = batch.floats(), batch.floats()
    advantages, returns = gae(rewards, values, batch.mask, gamma=gamma, lam=lam)
    pad = torch.nn.functional.pad
    wide = gae(
        pad(rewards, (0, 2), value=torch.nan),
        pad(values, (0, 2), value=torch.nan),
        pad(batch.mask, (0, 2)),
        gamma=gamma,
        lam=lam,
    )
    assert torch.equal(wide[0][:, :-2], advantages)
    assert torch.equal(wide[1][:, :-2], returns)
    order = torch.randperm(len(rewards), generator=batch.generator)
    assert torch.equal(gae(rewards[order], values[order], batch.mask[order], gamma=gamma, lam=lam)[0], advantages[order])


def test_a_thousand_responses_of_a_thousand_tokens_take_less_than_two_seconds() -> None:
    rewards, values = torch.randn(2, 1000, 1024).unbind(0)
    mask = torch.rand(1000, 1024) < 0.9
    start = time.perf_counter()
    gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert time.perf_counter() - start < 2


def inputs_of(batch: Batch, values: torch.Tensor | None) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=batch.floats(),
        scores=batch.scores(),
        groups=torch.arange(len(batch.mask)),
        mask=batch.mask,
        value_mask=batch.mask,
        values=values,
    )


@given(batches())
def test_the_registered_estimator_whitens_advantages_and_leaves_returns_alone(batch: Batch) -> None:
    inputs = inputs_of(batch, batch.floats())
    assert inputs.values is not None
    options = {"gamma": 0.9, "lam": 0.8, "skip_masked": True}
    advantages, returns = gae(inputs.rewards, inputs.values, inputs.value_mask, **options)
    plain = estimate_advantages("gae", inputs, whitened=False, **options)
    white = estimate_advantages("gae", inputs, whitened=True, **options)
    assert torch.equal(plain.advantages, advantages)
    assert plain.returns is not None
    assert white.returns is not None
    assert torch.equal(plain.returns, returns)
    assert torch.equal(white.returns, returns)
    assert abs(white.advantages[batch.mask].mean()) < 1e-6


@given(batches(), unit, unit, st.floats(0.05, 2))
def test_returns_and_advantages_have_a_lambda_each_and_that_of_advantages_grows_with_the_length(
    batch: Batch, gamma: float, critic_lam: float, alpha: float
) -> None:
    inputs = inputs_of(batch, batch.floats())
    assert inputs.values is not None
    options = {"gamma": gamma, "lam": 0.3, "skip_masked": True, "whitened": False}
    found = estimate_advantages("gae", inputs, **options, arguments={"critic_lam": critic_lam, "lam_alpha": alpha})
    assert found.returns is not None
    for row, mask in enumerate(batch.mask):
        rewards, values = inputs.rewards[row, mask].tolist(), inputs.values[row, mask].tolist()
        lam = max(0.0, 1 - 1 / (alpha * max(1, len(rewards))))
        expected = torch.tensor(by_definition(rewards, values, gamma, lam)).double()
        targets = torch.tensor(by_definition(rewards, values, gamma, critic_lam)).double() + inputs.values[row, mask]
        torch.testing.assert_close(found.advantages[row, mask], expected, atol=1e-5, rtol=1e-5, check_dtype=False)
        torch.testing.assert_close(found.returns[row, mask], targets, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_the_adaptive_lambda_is_0_for_short_responses_and_that_of_the_paper_for_long_ones() -> None:
    found = adaptive_lambda(torch.tensor([0, 10, 20, 40, 1000, 16000]), 0.05)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.98, 0.99875]))


def test_gae_without_a_critic_and_unknown_estimators_are_errors() -> None:
    batch = Batch(torch.ones(1, 1, dtype=torch.bool), torch.Generator())
    options = {"gamma": 1.0, "lam": 1.0, "skip_masked": True, "whitened": False}
    with pytest.raises(ValueError, match="needs a critic"):
        estimate_advantages("gae", inputs_of(batch, None), **options)
    with pytest.raises(UserError, match="'gea' is not registered; did you mean 'gae'"):
        estimate_advantages("gea", inputs_of(batch, None), **options)
