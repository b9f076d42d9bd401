import pytest
import torch
from hypothesis import given

from rayrlhf.algorithms.kl import KL_ESTIMATORS, kl_loss, kl_penalty
from rayrlhf.errors import UserError
from tests.algorithms.batches import Batch, batches, full_kl

every_estimator = pytest.mark.parametrize("estimator", KL_ESTIMATORS)


@every_estimator
def test_kl_is_0_when_the_policy_is_the_reference(estimator: str) -> None:
    logprobs = -torch.rand(3, 4)
    assert not kl_penalty(logprobs, logprobs, estimator).any()


@given(batches())
def test_each_estimator_is_its_formula(batch: Batch) -> None:
    logprobs, reference = batch.logprobs(), batch.logprobs()
    gap = logprobs - reference
    torch.testing.assert_close(kl_penalty(logprobs, reference, "k1"), gap)
    torch.testing.assert_close(kl_penalty(logprobs, reference, "abs"), gap.abs())
    torch.testing.assert_close(kl_penalty(logprobs, reference, "k2"), gap**2 / 2)
    k3 = reference.exp() / logprobs.exp() - 1 + gap
    torch.testing.assert_close(kl_penalty(logprobs, reference, "k3"), k3.clamp(max=10.0))
    for estimator in ("abs", "k2", "k3"):
        assert (kl_penalty(logprobs, reference, estimator) >= 0).all()


def test_full_kl_is_that_of_the_distributions_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, 7, 11, generator=generator).unbind(0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref_logits)
    )
    torch.testing.assert_close(full_kl(logits, ref_logits), expected)
    assert (full_kl(logits, ref_logits) >= 0).all()
    assert full_kl(logits, logits).abs().max() < 1e-6
    torch.testing.assert_close(full_kl(logits[:2], ref_logits[:2]), full_kl(logits, ref_logits)[:2])


def test_full_kl_stays_finite_where_the_policy_excludes_a_token() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf])
    assert full_kl(logits, torch.zeros(3)).item() == pytest.approx(torch.log(torch.tensor(1.5)).item())
    assert full_kl(logits, logits) == 0
    assert full_kl(torch.zeros(3), logits).isinf()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_agree_with_the_full_kl_over_many_samples(estimator: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, generator=generator)
    ref_logits = logits + 0.3 * torch.randn(16, generator=generator)
    tokens = torch.multinomial(logits.softmax(-1), 200_000, replacement=True, generator=generator)
    samples = kl_penalty(logits.log_softmax(-1)[tokens], ref_logits.log_softmax(-1)[tokens], estimator)
    standard_error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - full_kl(logits, ref_logits)) < 4 * standard_error


@every_estimator
def test_the_gradient_of_the_kl_loss_is_that_of_the_full_kl(estimator: str) -> None:
    # Exact expectation over the vocabulary: every token, weighted by its probability.
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    ref_logits = torch.randn(9, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    token_loss = kl_loss(log_p[None], ref_logits.log_softmax(-1)[None], torch.ones(1, 9, dtype=torch.bool), estimator)
    (ours,) = torch.autograd.grad((log_p.exp().detach() * token_loss[0]).sum(), logits)
    reference = ref_logits.log_softmax(-1)
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(token_loss[0], kl_penalty(log_p, reference, estimator))


@given(batches())
def test_nan_behind_the_mask_reaches_neither_the_kl_loss_nor_its_gradient(batch: Batch) -> None:
    for estimator in KL_ESTIMATORS:
        logprobs = batch.behind_nan(batch.logprobs()).requires_grad_()
        loss = kl_loss(logprobs, batch.behind_nan(batch.logprobs()), batch.mask, estimator)
        loss.sum().backward()
        assert logprobs.grad is not None
        assert loss.isfinite().all()
        assert logprobs.grad.isfinite().all()
        assert not logprobs.grad[~batch.mask].any()


def test_an_unknown_estimator_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'full' is not registered; known are abs, k1, k2, k3"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "full")


@pytest.mark.parametrize("log_ratio", [-51.0, -91.0, -1e4])
def test_one_token_of_k3_has_bounded_influence(log_ratio):
    kl = kl_penalty(torch.full((1, 1), log_ratio), torch.zeros(1, 1), "k3")
    assert kl.item() == 10.0
