"""The teacher's part of advantages against sums written out, and its gradient against the full reverse KL."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.distillation import teacher_advantages
from rayrlhf.algorithms.policy_losses import LossInputs, ppo_loss
from tests.algorithms.batches import Batch, batches, full_kl


@given(batches(), st.sampled_from([0.0, 0.5, 1.0]), st.none() | st.floats(0.1, 2))
def test_a_token_earns_its_own_log_ratio_and_discounted_later_ones(batch: Batch, discount: float, clip: float | None) -> None:
    policy, teacher = batch.logprobs(), batch.logprobs()
    found = teacher_advantages(batch.behind_nan(policy), batch.behind_nan(teacher), batch.mask, discount=discount, clip=clip)
    for row in range(len(batch.mask)):
        running = 0.0
        for column in reversed(batch.mask[row].nonzero().flatten().tolist()):
            ratio = (teacher - policy)[row, column].item()
            running = discount * running + (ratio if clip is None else min(max(ratio, -clip), clip))
            assert found[row, column].item() == pytest.approx(running, abs=1e-9)
    assert not found[~batch.mask].any()


def test_the_expected_gradient_is_that_of_the_reverse_kl_over_the_vocabulary() -> None:
    # One token of every kind, weighted by its probability, makes the expectation over samples exact.
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)
    mask = torch.ones(7, 1, dtype=torch.bool)
    known = logprobs.detach()[:, None]
    advantages = teacher_advantages(known, teacher.log_softmax(0)[:, None], mask)
    token_loss = ppo_loss(LossInputs(logprobs[:, None], known, advantages, mask))
    (token_loss.loss[:, 0] * known[:, 0].exp()).sum().backward()
    exact = logits.float().requires_grad_()
    full_kl(exact, teacher).backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.float(), exact.grad, atol=1e-6, rtol=1e-5)
