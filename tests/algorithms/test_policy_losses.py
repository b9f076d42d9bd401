from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSSES, token_policy_loss
from rayrlhf.algorithms.policy_losses import LossInputs, ppo_loss
from rayrlhf.errors import UserError
from tests.algorithms.batches import Batch, batches


def scalar_loss(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    """The objective of one token, in plain Python, negated."""
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


@given(batches(), st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.none() | st.floats(1.1, 4))
def test_each_token_has_the_loss_of_the_formula(batch: Batch, low: float, high: float, dual_clip: float | None) -> None:
    logprobs, old, advantages = batch.logprobs(), batch.logprobs(), batch.floats()
    token_loss = ppo_loss(LossInputs(logprobs, old, advantages, batch.mask), clip_low=low, clip_high=high, dual_clip=dual_clip)
    for row, column in batch.mask.nonzero().tolist():
        ratio = (logprobs - old)[row, column].exp().item()
        expected = scalar_loss(ratio, advantages[row, column].item(), low, high, dual_clip)
        assert token_loss.loss[row, column].item() == pytest.approx(expected, abs=1e-9)


@given(batches())
def test_the_first_update_has_ratio_1_and_loses_minus_the_advantage(batch: Batch) -> None:
    logprobs, advantages = batch.logprobs(), batch.floats()
    token_loss = ppo_loss(LossInputs(logprobs, logprobs, advantages, batch.mask))
    sums, tokens = token_loss.sums(), batch.mask.sum()
    assert torch.equal(token_loss.loss[batch.mask], -advantages[batch.mask])
    assert sums["val/ratio"] == tokens
    assert sums["policy/clipfrac_avg"] == sums["policy/approxkl_avg"] == sums["ppo/policy/policykl"] == 0


@given(batches())
def test_statistics_are_those_of_the_masked_tokens(batch: Batch) -> None:
    logprobs, old, advantages = batch.logprobs(), batch.logprobs(), batch.floats()
    leaf = batch.behind_nan(logprobs).requires_grad_()
    token_loss = ppo_loss(LossInputs(leaf, batch.behind_nan(old), batch.behind_nan(advantages), batch.mask))
    gap = (logprobs - old)[batch.mask]
    advantage = advantages[batch.mask]
    moved_out = ((gap.exp() > 1.2) & (advantage > 0)) | ((gap.exp() < 0.8) & (advantage < 0))
    expected = {
        "loss/policy_avg": token_loss.loss[batch.mask].sum(),
        "policy/approxkl_avg": (0.5 * gap**2).sum(),
        "policy/clipfrac_avg": moved_out.sum().double(),
        "val/ratio": gap.exp().sum(),
        "ppo/policy/policykl": -gap.sum(),
        "ppo/policy/advantages_mean": advantage.sum(),
    }
    assert token_loss.sums().keys() == expected.keys()
    for name, total in token_loss.sums().items():
        assert not total.requires_grad
        torch.testing.assert_close(total, expected[name].detach())


@given(batches(), st.none() | st.floats(1.1, 4))
def test_nan_behind_the_mask_reaches_neither_loss_nor_gradient(batch: Batch, dual_clip: float | None) -> None:
    inputs = [batch.logprobs(), batch.logprobs(), batch.floats()]

    def loss_and_gradient(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = tensors[0].clone().requires_grad_()
        loss = ppo_loss(LossInputs(logprobs, tensors[1], tensors[2], batch.mask), dual_clip=dual_clip).loss
        loss.sum().backward()
        assert logprobs.grad is not None
        return loss.detach(), logprobs.grad

    loss, gradient = loss_and_gradient(inputs)
    loss_of_nan, gradient_of_nan = loss_and_gradient([batch.behind_nan(tensor) for tensor in inputs])
    assert torch.equal(loss, loss_of_nan)
    assert torch.equal(gradient, gradient_of_nan)
    assert not gradient[~batch.mask].any()


@given(batches(), st.integers(1, 4))
def test_splitting_the_batch_does_not_change_the_gradient(batch: Batch, size: int) -> None:
    logprobs, old, advantages = batch.logprobs(), batch.logprobs(), batch.floats()

    def gradient(micro_batch: int) -> torch.Tensor:
        leaf = logprobs.clone().requires_grad_()
        for rows in torch.arange(len(leaf)).split(micro_batch):
            token_loss = ppo_loss(LossInputs(leaf[rows], old[rows], advantages[rows], batch.mask[rows]))
            (token_loss.loss.sum() / batch.mask.sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(size), gradient(len(logprobs)))


def test_a_clipped_token_gets_no_gradient_and_dual_clip_stops_runaway_ratios() -> None:
    # Ratios 2, 2, 0.1, 0.1 with advantages of both signs; dual clip at 1.5 reaches the second token only.
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)

    def moves(dual_clip: float | None) -> list[bool]:
        logprobs = torch.tensor([[2.0, 2.0, 0.1, 0.1]]).log().requires_grad_()
        ppo_loss(LossInputs(logprobs, old, advantages, mask), dual_clip=dual_clip).loss.sum().backward()
        assert logprobs.grad is not None
        return logprobs.grad[0].ne(0).tolist()

    assert moves(None) == [False, True, True, False]
    assert moves(1.5) == [False, False, True, False]


def test_an_absurd_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[0.0]]).requires_grad_()
    token_loss = ppo_loss(LossInputs(logprobs, torch.tensor([[-1000.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]])))
    token_loss.loss.sum().backward()
    assert logprobs.grad is not None
    assert token_loss.loss.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_an_empty_micro_batch_adds_0() -> None:
    # Ranks that ran out of samples still take part in the collectives.
    nan = torch.full((2, 3), torch.nan)
    logprobs = nan.clone().requires_grad_()
    token_loss = POLICY_LOSSES["ppo"](
        LossInputs(logprobs, nan, nan, torch.zeros(2, 3, dtype=torch.bool)), clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    token_loss.loss.sum().backward()
    assert logprobs.grad is not None
    assert not logprobs.grad.any()
    assert all(total == 0 for total in token_loss.sums().values())


def squared_ratio(inputs: LossInputs, *, weight: float) -> TokenLoss:
    """A loss from outside: it reads the reference too, and returns one statistic of its own."""
    assert inputs.ref_logprobs is not None
    loss = -weight * inputs.advantages * (2 * (inputs.logprobs - inputs.ref_logprobs)).exp() + 1.0
    return TokenLoss(loss, {"loss/own": loss.detach()})


def total(inputs: LossInputs) -> torch.Tensor:
    """A loss from outside that is wrong: it reduces."""
    return inputs.logprobs.sum()


def inputs_of(batch: Batch) -> LossInputs:
    return LossInputs(batch.logprobs(), batch.logprobs(), batch.floats(), batch.mask, ref_logprobs=batch.logprobs())


@given(batches())
def test_a_loss_from_outside_is_masked_and_reports_the_usual_statistics_too(batch: Batch) -> None:
    inputs = inputs_of(batch)
    token_loss = token_policy_loss(f"{__name__}:squared_ratio", inputs, {"weight": 3.0})
    expected = squared_ratio(inputs, weight=3.0).loss
    assert torch.equal(token_loss.loss[batch.mask], expected[batch.mask])
    assert not token_loss.loss[~batch.mask].any()
    assert token_loss.statistics.keys() == ppo_loss(inputs).statistics.keys() | {"loss/own"}
    torch.testing.assert_close(token_loss.statistics["val/ratio"], ppo_loss(inputs).statistics["val/ratio"])


def test_a_loss_from_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from rayrlhf.algorithms.losses import TokenLoss\n"
        "def reinforce(inputs):\n"
        "    return TokenLoss(-inputs.advantages * inputs.logprobs, {})\n"
    )
    batch = Batch(torch.ones(2, 3, dtype=torch.bool), torch.Generator().manual_seed(0))
    inputs = inputs_of(batch)
    assert torch.equal(token_policy_loss(f"{file}:reinforce", inputs, {}).loss, -inputs.advantages * inputs.logprobs)
    with pytest.raises(UserError, match=r"has no function 'reinfoce'; did you mean 'reinforce'\?"):
        token_policy_loss(f"{file}:reinfoce", inputs, {})


def test_a_loss_that_reduces_is_an_error() -> None:
    batch = Batch(torch.ones(2, 3, dtype=torch.bool), torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"returned Tensor, expected a TokenLoss with a loss of shape \(2, 3\)"):
        token_policy_loss(f"{__name__}:total", inputs_of(batch), {})
