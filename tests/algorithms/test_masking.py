import pytest
import torch
from hypothesis import given

from rayrlhf.algorithms.masking import masked_mean, masked_moments, masked_sum, zero_masked
from tests.algorithms.batches import Batch, batches


@given(batches())
def test_moments_are_those_of_the_selected_values(batch: Batch) -> None:
    values = batch.floats()
    selected = values[batch.mask]
    size, mean, variance = masked_moments(batch.behind_nan(values), batch.mask)
    assert size == len(selected)
    torch.testing.assert_close(mean, selected.mean())
    torch.testing.assert_close(variance, selected.var() if len(selected) > 1 else torch.zeros_like(variance))
    torch.testing.assert_close(masked_mean(batch.behind_nan(values), batch.mask), selected.mean())
    torch.testing.assert_close(masked_sum(batch.behind_nan(values), batch.mask), selected.sum())


@given(batches())
def test_no_gradient_leaks_from_behind_the_mask(batch: Batch) -> None:
    values = batch.behind_nan(batch.floats()).requires_grad_()
    zero_masked(values, batch.mask).square().sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, 2 * zero_masked(values.detach(), batch.mask))


def test_a_mask_that_selects_nothing_is_an_error_with_its_shape() -> None:
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3\) selects no value"):
        masked_mean(torch.ones(2, 3), nowhere)
    with pytest.raises(ValueError, match="selects no value"):
        masked_moments(torch.ones(2, 3), nowhere)
    assert masked_sum(torch.ones(2, 3), nowhere) == 0
