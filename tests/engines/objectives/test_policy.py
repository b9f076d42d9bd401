"""The policy's objective takes the losses and gradients that TRL 1.16's `GRPOTrainer` takes on the same log-probs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from rayrlhf.algorithms.policy_losses import positive_weights
from rayrlhf.config.algorithm import KlSection
from rayrlhf.config.policy_loss import AnyPolicyLoss
from rayrlhf.engines.objectives.base import responses_under, weighted_loss
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.observe.metric_names import LOGPROB_GAP
from tests.algorithms.batches import Batch, batches

LONGEST = 16
reproducible = settings(deadline=None, derandomize=True)
policy_loss_section = TypeAdapter(AnyPolicyLoss).validate_python

CASES = {
    "token": ({}, {"loss_type": "dapo"}),
    "clip-higher": ({"clip_low": 0.1, "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_low": 0.1, "epsilon_high": 0.28}),
    "dual clip": ({"dual_clip": 1.5}, {"loss_type": "dapo", "delta": 1.5}),
    "sequence": ({"loss_aggregation": "sequence"}, {"loss_type": "grpo"}),
    "constant": ({"loss_aggregation": "constant"}, {"loss_type": "dr_grpo", "max_completion_length": LONGEST}),
    "another constant": (
        {"loss_aggregation": "constant", "loss_aggregation_length": 7},
        {"loss_type": "dr_grpo", "max_completion_length": 7},
    ),
    "gspo": (
        {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "gspo with its own range": (
        {"name": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo with its own bound": ({"name": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo": ({"name": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
    "cispo a sequence": (
        {"name": "cispo", "clip_high": 9.0, "loss_aggregation": "constant"},
        {"loss_type": "cispo", "epsilon_high": 10.0},
    ),
    "entropy, token": (
        {"entropy_coefficient": 0.3},
        {"loss_type": "bnpo", "entropy_coef": 0.3, "_entropy_bonus_enabled": True},
    ),
    "entropy, sequence": (
        {"entropy_coefficient": 0.3, "loss_aggregation": "sequence"},
        {"loss_type": "grpo", "entropy_coef": 0.3, "_entropy_bonus_enabled": True},
    ),
}


def loss_of(objective: PolicyObjective, outputs: dict[str, Tensor], arrays: dict[str, Tensor]) -> Tensor:
    mask = arrays["action_mask"]
    denominators = {"action_mask": float(mask.sum()), responses_under("action_mask"): float(mask.any(1).sum())}
    return weighted_loss(objective.compute(outputs, arrays), denominators)


def arrays_of(batch: Batch, old: Tensor, advantages: Tensor, **more: Tensor) -> dict[str, Tensor]:
    known = {"old_logprobs": old, "advantages": advantages[:, None].expand(batch.mask.shape), **more}
    return {name: batch.behind_nan(values) for name, values in known.items()} | {"action_mask": batch.mask}


@pytest.mark.parametrize("case", [name for name in CASES if name != "cispo a sequence"])
@reproducible
@given(batch=batches(holes=False))
def test_value_and_gradient_are_those_of_trl(case: str, batch: Batch) -> None:
    from tests.algorithms.trl_group import trl_loss

    ours, theirs = CASES[case]
    old, advantages = batch.logprobs(), batch.scores()
    start, entropy = batch.logprobs(), batch.logprobs().abs()
    results = []
    for side in ("ours", "theirs"):
        leaves = [start.clone().requires_grad_(), entropy.clone().requires_grad_()]
        if side == "ours":
            objective = PolicyObjective(policy_loss_section(ours), longest=LONGEST)
            outputs = dict(zip(("logprobs", "entropy"), leaves, strict=True))
            loss = loss_of(objective, outputs, arrays_of(batch, old, advantages))
        else:
            loss = trl_loss(batch.mask, leaves[0], old, advantages, entropy=leaves[1], **theirs)
        loss.backward()
        results.append([loss.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)])
    for own, reference in zip(*results, strict=True):
        torch.testing.assert_close(own, reference.expand_as(own).to(own.dtype), atol=1e-9, rtol=1e-6)


@reproducible
@given(batches(holes=False), st.sampled_from([None, "sequence"]))
def test_the_kl_in_the_loss_has_trls_value_and_the_gradient_of_k2(batch: Batch, loss_aggregation: str | None) -> None:
    from tests.algorithms.trl_group import trl_loss

    old, start, nothing = batch.logprobs(), batch.logprobs(), torch.zeros(len(batch.mask)).double()
    # Within the bound on k3, which TRL does not have.
    reference = start + batch.floats().clamp(-2.0, 2.0)
    leaf = start.clone().requires_grad_()
    objective = PolicyObjective(
        policy_loss_section({"loss_aggregation": loss_aggregation}),
        KlSection(estimator="k3", placement="loss", coefficient=0.4),
    )
    loss = loss_of(objective, {"logprobs": leaf}, arrays_of(batch, old, nothing, ref_logprobs=reference))
    theirs = trl_loss(
        batch.mask, start, old, nothing, reference=reference, beta=0.4, use_bias_correction_kl=True,
        loss_type="grpo" if loss_aggregation else "dapo",
    )  # fmt: skip
    torch.testing.assert_close(loss.detach(), theirs)
    loss.backward()
    share = 1 / (batch.mask.sum(1, keepdim=True) * len(batch.mask)) if loss_aggregation else 1 / batch.mask.sum()
    expected = 0.4 * (start - old).exp() * (start - reference) * share
    torch.testing.assert_close(leaf.grad, torch.where(batch.mask, expected, 0.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_multiply_the_surrogate_as_trls_do(level: str) -> None:
    from tests.algorithms.trl_group import trl_loss

    batch = Batch(torch.ones(3, 4, dtype=torch.bool), torch.Generator().manual_seed(0))
    old, logprobs, advantages = batch.logprobs(), batch.logprobs(), batch.scores()
    weights = batch.logprobs().exp() if level == "token" else batch.logprobs().exp()[:, :1]
    arrays = arrays_of(batch, old, advantages, importance_weights=weights.expand(3, 4))
    ours = loss_of(PolicyObjective(importance=True), {"logprobs": logprobs}, arrays)
    theirs = trl_loss(batch.mask, logprobs, old, advantages, loss_type="dapo", importance_sampling_ratio=weights)
    torch.testing.assert_close(ours, theirs)


@reproducible
@given(batches(), st.sampled_from(["token", "sequence", "constant"]))
def test_correct_responses_add_the_mean_negative_logprob_of_their_tokens(batch: Batch, loss_aggregation: str) -> None:
    old, advantages, right = batch.logprobs(), batch.scores(), batch.scores() > 0
    arrays = arrays_of(batch, old, advantages, positive_weights=positive_weights(right, batch.mask))
    start, gradients, values = batch.logprobs(), [], []
    for coefficient in (0.0, 0.1):
        leaf = start.clone().requires_grad_()
        section = policy_loss_section({"loss_aggregation": loss_aggregation, "positive_coefficient": coefficient})
        loss = loss_of(PolicyObjective(section, longest=LONGEST), {"logprobs": leaf, "entropy": start}, arrays)
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        values.append(float(loss.detach()))
    places = [(row, token) for row, token in batch.mask.nonzero().tolist() if right[row]]
    expected = torch.zeros_like(start)
    for place in places:
        expected[place] = -0.1 / len(places)
    torch.testing.assert_close(gradients[1] - gradients[0], expected)
    added = -0.1 * sum(float(start[place]) for place in places) / max(len(places), 1)
    assert values[1] - values[0] == pytest.approx(added, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@reproducible
@given(batch=batches(), size=st.integers(1, 4))
def test_splitting_into_micro_batches_does_not_change_the_gradient(case: str, batch: Batch, size: int) -> None:
    objective = PolicyObjective(policy_loss_section(CASES[case][0]), longest=LONGEST)
    arrays = arrays_of(batch, batch.logprobs(), batch.scores())
    start, entropy = batch.behind_nan(batch.logprobs()), batch.behind_nan(batch.logprobs().abs())
    mask = batch.mask
    denominators = {"action_mask": float(mask.sum()), responses_under("action_mask"): float(len(mask))}
    gradients = []
    for count in (size, len(mask)):
        leaf = start.clone().requires_grad_()
        for rows in torch.arange(len(mask)).split(count):
            outputs = {"logprobs": leaf[rows], "entropy": entropy[rows]}
            components = objective.compute(outputs, {name: array[rows] for name, array in arrays.items()})
            weighted_loss(components, denominators).backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_one_response_of_a_group_is_clipped_as_a_whole_by_gspo_and_token_by_token_by_ppo() -> None:
    # Token ratios 1.5 and 1/1.5: the response's ratio is 1, so gspo leaves it alone where ppo clips the first token.
    step = torch.tensor(1.5).log()
    arrays = {
        "old_logprobs": torch.zeros(1, 2), "advantages": torch.ones(1, 2), "action_mask": torch.ones(1, 2, dtype=torch.bool)
    }  # fmt: skip
    moved = {}
    clips = {"ppo": {}, "gspo": {"clip_low": 0.2, "clip_high": 0.2}, "cispo": {"clip_high": 0.2}}
    for name, clip in clips.items():
        leaf = torch.stack([step, -step])[None].requires_grad_()
        objective = PolicyObjective(policy_loss_section({"name": name, **clip}), entropy=False)
        loss_of(objective, {"logprobs": leaf}, arrays).backward()
        assert leaf.grad is not None
        moved[name] = leaf.grad[0].tolist()
    assert moved["ppo"] == pytest.approx([0.0, -0.5 / 1.5])
    assert moved["gspo"] == pytest.approx([-0.5, -0.5])
    assert moved["cispo"] == pytest.approx([-0.5 * 1.2, -0.5 / 1.5])


@pytest.mark.parametrize("case", CASES)
@reproducible
@given(batch=batches())
def test_without_old_logprobs_the_ratio_is_one_and_the_gap_to_the_engine_is_reported(case: str, batch: Batch) -> None:
    objective = PolicyObjective(policy_loss_section(CASES[case][0]), longest=LONGEST, gap=True)
    start, entropy = batch.logprobs(), batch.logprobs().abs()
    known = arrays_of(batch, start, batch.scores(), rollout_logprobs=start - 0.25)
    gradients = []
    for arrays in (known, {name: array for name, array in known.items() if name != "old_logprobs"}):
        leaf = batch.behind_nan(start).requires_grad_()
        components = objective.compute({"logprobs": leaf, "entropy": entropy}, arrays)
        gap = components[0].token_loss.statistics[LOGPROB_GAP]
        torch.testing.assert_close(gap, 0.25 * batch.mask.double())
        loss_of(objective, {"logprobs": leaf, "entropy": entropy}, arrays).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
