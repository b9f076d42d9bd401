import pytest
import torch
from hypothesis import assume, given

from rayrlhf.algorithms.masking import whiten
from tests.algorithms.batches import Batch, batches


@given(batches())
def test_whitened_values_have_mean_0_and_unbiased_variance_1(batch: Batch) -> None:
    assume(batch.mask.sum() > 1)
    values = batch.floats(scale=3.0) + 5.0
    assume(values[batch.mask].var() > 1e-2)
    whitened = whiten(values, batch.mask)[batch.mask]
    assert abs(whitened.mean()) < 1e-9
    assert abs(whitened.var() - 1) < 1e-5


@given(batches())
def test_keeping_the_mean_keeps_it(batch: Batch) -> None:
    values = batch.floats() + 5.0
    kept = whiten(values, batch.mask, shift_mean=False)
    torch.testing.assert_close(kept[batch.mask].mean(), values[batch.mask].mean())
    shifted = whiten(values, batch.mask)
    torch.testing.assert_close(kept[batch.mask], shifted[batch.mask] + values[batch.mask].mean())


@given(batches())
def test_whitening_ignores_values_behind_the_mask(batch: Batch) -> None:
    values = batch.floats()
    whitened = whiten(values, batch.mask)
    assert torch.equal(whiten(batch.behind_nan(values), batch.mask), whitened)
    assert not whitened[~batch.mask].any()


@given(batches())
def test_padding_wider_and_permuting_the_batch_changes_nothing(batch: Batch) -> None:
    values = batch.floats()
    whitened = whiten(values, batch.mask)
    wide_mask = torch.nn.functional.pad(batch.mask, (0, 3))
    wide = whiten(torch.nn.functional.pad(values, (0, 3), value=torch.nan), wide_mask)
    torch.testing.assert_close(wide[:, : whitened.shape[1]], whitened)
    order = torch.randperm(len(values), generator=batch.generator)
    torch.testing.assert_close(whiten(values[order], batch.mask[order]), whitened[order])


def test_a_single_value_becomes_0_or_keeps_its_mean() -> None:
    value, mask = torch.tensor([[7.0, torch.nan]]), torch.tensor([[True, False]])
    assert whiten(value, mask).tolist() == [[0.0, 0.0]]
    assert whiten(value, mask, shift_mean=False).tolist() == [[7.0, 0.0]]


def test_nothing_to_whiten_is_an_error() -> None:
    with pytest.raises(ValueError, match="selects no value"):
        whiten(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("value", [0.7, 0.1, 1e3 / 3, -2.4])
def test_equal_values_whiten_to_exactly_nothing(value):
    equal = torch.full((64, 100), value)
    assert not whiten(equal, torch.ones_like(equal, dtype=torch.bool)).abs().max() > 1e-9
