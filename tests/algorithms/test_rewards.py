import pytest
import torch
from hypothesis import given

from rayrlhf.algorithms.masking import whiten
from rayrlhf.algorithms.reward_shaping import score_slots, slot_count, token_rewards
from tests.algorithms.batches import Batch, batches


@given(batches())
def test_a_response_earns_its_score_minus_its_kl(batch: Batch) -> None:
    kl, scores = batch.floats(), batch.scores()
    for position in ("last", "after_last"):
        earned = token_rewards(batch.behind_nan(kl), scores, batch.mask, 0.3, position=position)
        paid = torch.where(batch.mask, kl, 0).sum(1)
        torch.testing.assert_close(earned.rewards.sum(1), scores - 0.3 * paid)
        torch.testing.assert_close(earned.non_score.sum(1), -0.3 * paid)
        assert not earned.rewards[~earned.value_mask].any()
        assert not earned.non_score[~batch.mask].any()


@given(batches())
def test_the_last_action_receives_the_score(batch: Batch) -> None:
    scores = batch.scores()
    earned = token_rewards(None, scores, batch.mask, 0.3)
    for row, mask in enumerate(batch.mask):
        expected = torch.zeros(len(mask), dtype=scores.dtype)
        expected[mask.nonzero().max()] = scores[row]
        assert torch.equal(earned.rewards[row], expected)
    assert torch.equal(earned.value_mask, batch.mask)


def test_after_last_is_the_next_slot_except_at_the_right_edge() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    assert score_slots(mask, "after_last").tolist() == [2, 3, 3, 3]
    value_mask = token_rewards(None, torch.ones(4), mask, 0.0, position="after_last").value_mask
    assert value_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]


@given(batches())
def test_rewards_per_token_add_to_the_score(batch: Batch) -> None:
    kl, scores, extra = batch.floats(), batch.scores(), batch.floats()
    plain = token_rewards(kl, scores, batch.mask, 0.3)
    both = token_rewards(kl, scores, batch.mask, 0.3, token_scores=batch.behind_nan(extra))
    torch.testing.assert_close(both.rewards - plain.rewards, torch.where(batch.mask, extra, 0))


@given(batches())
def test_whitened_rewards_keep_their_mean(batch: Batch) -> None:
    earned = token_rewards(batch.floats(), batch.scores(), batch.mask, 0.3, position="after_last")
    whitened = whiten(earned.rewards, earned.value_mask, shift_mean=False)
    torch.testing.assert_close(whitened[earned.value_mask].mean(), earned.rewards[earned.value_mask].mean())


@given(batches())
def test_padding_wider_changes_nothing(batch: Batch) -> None:
    kl, scores = batch.floats(), batch.scores()
    narrow = token_rewards(kl, scores, batch.mask, 0.3)
    wide = token_rewards(
        torch.nn.functional.pad(kl, (0, 2), value=torch.nan), scores, torch.nn.functional.pad(batch.mask, (0, 2)), 0.3
    )
    assert torch.equal(wide.rewards[:, :-2], narrow.rewards)
    assert not wide.value_mask[:, -2:].any()


@pytest.mark.parametrize(("longest", "columns"), [(3, 4), (7, 8), (8, 8)])
def test_columns_leave_room_for_the_slot_after_a_response_that_stopped(longest: int, columns: int) -> None:
    assert slot_count(longest, 8, "after_last") == columns
    assert slot_count(longest, 8, "last") == longest


def test_a_response_without_an_action_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        score_slots(torch.tensor([[True], [False]]))
