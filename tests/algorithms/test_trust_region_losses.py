"""Trust-region losses against formulas of one token in plain Python, and TRL 1.16 where it has them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.covariance import clip_cov_tokens, covariances, kl_cov_tokens
from rayrlhf.algorithms.policy_loss_registry import token_policy_loss
from rayrlhf.algorithms.policy_losses import LossInputs, aggregated, prompt_weights
from tests.algorithms.batches import Batch, batches

reproducible = settings(deadline=None, derandomize=True)


def loss_and_gradient(name: str, batch: Batch, arguments: dict, selected: Tensor | None = None) -> tuple[list[dict], Tensor]:
    """One dict of plain numbers per token, and the gradient of the summed loss; everything behind the mask is NaN."""
    tensors = [batch.logprobs(), batch.logprobs(), batch.floats()]
    hidden = [batch.behind_nan(tensor) for tensor in tensors]
    leaf = hidden[0].clone().requires_grad_()
    inputs = LossInputs(leaf, hidden[1], hidden[2], batch.mask, selected=selected)
    loss = token_policy_loss(name, inputs, arguments).loss
    loss.sum().backward()
    assert leaf.grad is not None
    assert not loss[~batch.mask].any()
    assert not leaf.grad[~batch.mask].any()
    tokens = [
        {
            "row": row, "column": column, "new": tensors[0][row, column].item(), "old": tensors[1][row, column].item(),
            "advantage": tensors[2][row, column].item(), "loss": loss[row, column].item(),
            "gradient": leaf.grad[row, column].item(),
        }
        for row, column in batch.mask.nonzero().tolist()
    ]  # fmt: skip
    return tokens, leaf.grad


def near(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=1e-9, rel=1e-9)


@reproducible
@given(batches(), st.floats(0.5, 3), st.floats(0.5, 3))
def test_sapo_passes_the_ratio_through_a_gate(batch: Batch, positive: float, negative: float) -> None:
    arguments = {"temperature_positive": positive, "temperature_negative": negative}
    for token in loss_and_gradient("sapo", batch, arguments)[0]:
        tau = positive if token["advantage"] > 0 else negative
        ratio = math.exp(token["new"] - token["old"])
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        near(token["loss"], -token["advantage"] * 4 / tau * gate)
        near(token["gradient"], -token["advantage"] * 4 * gate * (1 - gate) * ratio)


@reproducible
@given(batches(holes=False))
def test_sapo_and_gmpo_have_value_and_gradient_of_trl(batch: Batch) -> None:
    from trl.experimental.gmpo import GMPOTrainer

    from tests.algorithms.trl_group import trl_loss

    old, start, scores = batch.logprobs(), batch.logprobs(), batch.scores()
    wide = scores[:, None].expand(batch.mask.shape)
    theirs = {
        "sapo": {"loss_type": "sapo"},
        "gmpo": {"trainer": GMPOTrainer, "epsilon_low": 0.4, "epsilon_high": 0.4},
    }
    for name, settings_of_trl in theirs.items():
        ours, reference = start.clone().requires_grad_(), start.clone().requires_grad_()
        token_loss = token_policy_loss(name, LossInputs(ours, old, wide, batch.mask), {})
        own = aggregated(token_loss.loss, batch.mask, "sequence", 1).sum() / len(batch.mask)
        expected = trl_loss(batch.mask, reference, old, scores, **settings_of_trl)
        own.backward()
        expected.backward()
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)  # TRL's temperatures are float32
        torch.testing.assert_close(ours.grad, reference.grad, atol=1e-6, rtol=1e-6)


@reproducible
@given(batches(), st.floats(0.1, 1), st.floats(0.1, 1))
def test_gmpo_is_the_geometric_mean_of_ratios_clipped_on_the_side_of_the_advantage(
    batch: Batch, low: float, high: float
) -> None:
    tokens, _ = loss_and_gradient("gmpo", batch, {"clip_low": low, "clip_high": high})
    for row in range(len(batch.mask)):
        own = [token for token in tokens if token["row"] == row]
        gaps = [token["new"] - token["old"] for token in own]
        bounded = [min(gap, high) if token["advantage"] > 0 else max(gap, -low) for gap, token in zip(gaps, own, strict=True)]
        mean = math.exp(sum(bounded) / len(own))
        total = sum(token["advantage"] for token in own)
        for token, gap, kept in zip(own, gaps, bounded, strict=True):
            near(token["loss"], -token["advantage"] * mean)
            near(token["gradient"], -total * mean / len(own) if gap == kept else 0.0)


@reproducible
@given(batches(), st.sampled_from(["tv", "kl"]), st.none() | st.floats(0.01, 0.3))
def test_dppo_masks_tokens_that_moved_too_far_along_their_advantage(
    batch: Batch, divergence: str, threshold: float | None
) -> None:
    limit = threshold or {"tv": 0.15, "kl": 0.05}[divergence]
    for token in loss_and_gradient("dppo", batch, {"divergence": divergence, "threshold": threshold})[0]:
        p, q = math.exp(token["new"]), math.exp(token["old"])
        kl = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        distance = abs(p - q) if divergence == "tv" else kl
        outward = p > q if token["advantage"] > 0 else p < q
        kept = not (outward and distance > limit)
        near(token["gradient"], -token["advantage"] * min(p / q, 20.0) if kept else 0.0)


@reproducible
@given(batches())
def test_topr_keeps_good_responses_and_tapers_bad_ones(batch: Batch) -> None:
    tokens, _ = loss_and_gradient("topr", batch, {})
    for row in range(len(batch.mask)):
        own = [token for token in tokens if token["row"] == row]
        ratio = math.exp(sum(token["new"] - token["old"] for token in own))
        for token in own:
            weight = 1.0 if token["advantage"] > 0 else min(ratio, 1.0)
            near(token["loss"], -weight * token["advantage"] * token["new"])
            near(token["gradient"], -weight * token["advantage"])


@reproducible
@given(batches(), st.integers(0, 2**31))
def test_selected_tokens_lose_their_gradient_or_pay_a_penalty(batch: Batch, seed: int) -> None:
    selected = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    for token in loss_and_gradient("clip_cov", batch, {"clip_low": 0.2, "clip_high": 0.3}, selected)[0]:
        ratio, advantage = math.exp(token["new"] - token["old"]), token["advantage"]
        expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
        near(token["loss"], 0.0 if selected[token["row"], token["column"]] else expected)
    for token in loss_and_gradient("kl_cov", batch, {"penalty": 0.5}, selected)[0]:
        gap = token["new"] - token["old"]
        chosen = bool(selected[token["row"], token["column"]])
        near(token["loss"], -token["advantage"] * math.exp(gap) + (0.5 * abs(gap) if chosen else 0.0))
        slope = math.copysign(0.5, gap) if chosen else 0.0
        near(token["gradient"], -token["advantage"] * math.exp(gap) + slope)


def test_a_covariance_loss_without_selection_is_an_error() -> None:
    batch = Batch(torch.ones(1, 1, dtype=torch.bool), torch.Generator())
    with pytest.raises(ValueError, match="clip_cov and kl_cov read the tokens"):
        loss_and_gradient("clip_cov", batch, {})


@reproducible
@given(batches(), st.floats(0.01, 1), st.integers(0, 2**31))
def test_covariances_are_products_of_distances_and_tokens_are_drawn_or_ranked_by_them(
    batch: Batch, share: float, seed: int
) -> None:
    advantages, logprobs, mask = batch.floats(), batch.logprobs(), batch.mask
    covariance = covariances(batch.behind_nan(advantages), batch.behind_nan(logprobs), mask)
    first, second = advantages[mask], logprobs[mask]
    torch.testing.assert_close(covariance[mask], (first - first.mean()) * (second - second.mean()))
    count = max(1, int(share * len(first)))
    largest = kl_cov_tokens(covariance, mask, share=share)
    assert largest.sum() == count
    assert not largest[~mask].any()
    rest = mask & ~largest
    assert not rest.any() or covariance[largest].min() >= covariance[rest].max()
    bounds = {"share": share, "cov_low": 0.0, "cov_high": 0.5}
    drawn = clip_cov_tokens(covariance, mask, generator=torch.Generator().manual_seed(seed), **bounds)
    again = clip_cov_tokens(covariance, mask, generator=torch.Generator().manual_seed(seed), **bounds)
    within = mask & (covariance > 0) & (covariance < 0.5)
    assert torch.equal(drawn, again)
    assert not drawn[~within].any()
    assert drawn.sum() == min(count, int(within.sum()))


@reproducible
@given(batches(), st.integers(0, 2**31))
def test_the_aggregation_by_prompt_is_the_mean_of_the_token_means_of_prompts(batch: Batch, seed: int) -> None:
    # Prompts have different numbers of responses, some of which may have no token to train on.
    mask = torch.cat([batch.mask, batch.mask.flip(0)])
    groups = torch.arange(len(mask)).sqrt().long()
    losses = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)), 0.0)
    own = aggregated(losses, mask, "prompt", 1, prompt_weights(groups, mask)).sum() / mask.any(1).sum()
    means = [losses[groups == group].sum() / mask[groups == group].sum() for group in groups[mask.any(1)].unique()]
    torch.testing.assert_close(own, torch.stack(means).mean())
    assert (prompt_weights(torch.tensor([4]), torch.zeros(1, 3, dtype=torch.bool)) == 0).all()
