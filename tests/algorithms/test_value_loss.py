import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.losses import clipped_value_loss
from tests.algorithms.batches import Batch, batches


@given(batches(), st.none() | st.floats(0.05, 2))
def test_each_token_has_the_loss_of_the_formula(batch: Batch, clip: float | None) -> None:
    values, old, returns = batch.floats(), batch.floats(), batch.floats()
    token_loss = clipped_value_loss(values, old, returns, batch.mask, clip=clip)
    for row, column in batch.mask.nonzero().tolist():
        new, before, target = (tensor[row, column].item() for tensor in (values, old, returns))
        near = new if clip is None else min(max(new, before - clip), before + clip)
        assert token_loss.loss[row, column].item() == pytest.approx(
            0.5 * max((new - target) ** 2, (near - target) ** 2), abs=1e-9
        )
        assert token_loss.statistics["val/clipfrac_avg"][row, column].item() == ((near - target) ** 2 > (new - target) ** 2)
        assert token_loss.statistics["ppo/val/error"][row, column].item() == pytest.approx((new - target) ** 2)
        assert token_loss.statistics["ppo/val/vpred"][row, column].item() == new


@given(batches())
def test_an_unmoved_critic_is_never_clipped(batch: Batch) -> None:
    values, returns = batch.floats(), batch.floats()
    token_loss = clipped_value_loss(values, values, returns, batch.mask)
    assert token_loss.sums()["val/clipfrac_avg"] == 0
    assert torch.equal(token_loss.loss[batch.mask], 0.5 * (values - returns).square()[batch.mask])


@given(batches(), st.none() | st.floats(0.05, 2))
def test_nan_behind_the_mask_reaches_neither_loss_nor_gradient(batch: Batch, clip: float | None) -> None:
    inputs = [batch.floats(), batch.floats(), batch.floats()]

    def loss_and_gradient(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        values = tensors[0].clone().requires_grad_()
        token_loss = clipped_value_loss(values, *tensors[1:], batch.mask, clip=clip)
        token_loss.loss.sum().backward()
        assert values.grad is not None
        assert all(total.isfinite() and not total.requires_grad for total in token_loss.sums().values())
        return token_loss.loss.detach(), values.grad

    loss, gradient = loss_and_gradient(inputs)
    loss_of_nan, gradient_of_nan = loss_and_gradient([batch.behind_nan(tensor) for tensor in inputs])
    assert torch.equal(loss, loss_of_nan)
    assert torch.equal(gradient, gradient_of_nan)
    assert not gradient[~batch.mask].any()


@given(batches(), st.integers(1, 4))
def test_splitting_the_batch_does_not_change_the_gradient(batch: Batch, size: int) -> None:
    values, old, returns = batch.floats(), batch.floats(), batch.floats()

    def gradient(micro_batch: int) -> torch.Tensor:
        leaf = values.clone().requires_grad_()
        for rows in torch.arange(len(leaf)).split(micro_batch):
            token_loss = clipped_value_loss(leaf[rows], old[rows], returns[rows], batch.mask[rows])
            (token_loss.loss.sum() / batch.mask.sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(size), gradient(len(values)))
