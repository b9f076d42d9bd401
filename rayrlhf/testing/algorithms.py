"""Contract tests of policy losses, advantage estimators and KL kinds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import ADVANTAGE_REGISTRY
from rayrlhf.algorithms.estimator import AdvantageEstimator, AdvantageInputs, AdvantageMethod, Advantages
from rayrlhf.algorithms.kl import KL_REGISTRY, KLEstimator
from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSS_REGISTRY
from rayrlhf.algorithms.policy_losses import LossInputs, PolicyLoss
from rayrlhf.errors import UserError
from rayrlhf.plugins import bind_arguments
from rayrlhf.testing.expect import expect

LENGTHS = (5, 3, 1, 4)
"""Response lengths of the checked batch."""


def check_policy_loss(loss: PolicyLoss | str, **arguments: object) -> TokenLoss:
    """Check a policy loss on a small batch.

    Loss and statistics must have the shape of the log-probs, be finite, and be 0 outside the mask. The gradient must reach the
    log-probs of sampled tokens and no others. A response must have the same loss alone as within the batch. Values
    outside the mask must not change the loss of a sampled token.

    Args:
        loss: the function or its name in a config.
        arguments: `algorithm.policy_loss.arguments` of the config.

    Returns:
        The loss of the batch, float [4, 5].

    Raises:
        AssertionError: the loss breaks its contract.
    """
    function: PolicyLoss = _resolved("policy loss", POLICY_LOSS_REGISTRY.resolve, loss, arguments, 1)
    inputs = _loss_inputs()
    result: TokenLoss = function(inputs)
    expect(isinstance(result, TokenLoss), f"the loss returned {type(result).__name__}, expected a TokenLoss")
    _check_tokens("loss", result.loss, inputs.mask)
    for name, values in result.statistics.items():
        _check_tokens(f"statistic {name}", values, inputs.mask)
        expect(not values.requires_grad, f"statistic {name} has a gradient: detach it")
    expect(result.loss.requires_grad, "the loss has no gradient: it must depend on inputs.logprobs")
    (gradient,) = torch.autograd.grad(result.loss.sum(), inputs.logprobs)
    _check_tokens("the gradient of the log-probs", gradient, inputs.mask)
    expect(gradient.abs().sum() > 0, "the gradient is 0 for every token")
    for row in range(len(LENGTHS)):
        alone = function(_loss_inputs(slice(row, row + 1))).loss
        same = torch.allclose(alone[0], result.loss[row], rtol=1e-5, atol=1e-6)
        expect(same, f"response {row} has another loss alone than within the batch: a loss must not average over the batch")
    nan = {name: values.masked_fill(~inputs.mask, torch.nan) for name, values in _floats(inputs)}
    garbage = function(replace(inputs, **nan))
    same = torch.allclose(garbage.loss[inputs.mask], result.loss[inputs.mask], rtol=1e-5, atol=1e-6)
    expect(same, "the loss of a sampled token depends on values outside the mask")
    return result


def check_advantage_estimator(estimator: AdvantageEstimator | AdvantageMethod | str, **arguments: object) -> Advantages:
    """Check an advantage estimator on a small step of two groups.

    Advantages, and returns where there are any, must have the shape of the mask and be finite. Advantages must be 0 outside the
    action mask. The inputs must stay as they were. Reordering the responses must reorder their advantages.

    Args:
        estimator: the function or method, or its name in a config.
        arguments: `algorithm.advantage.arguments` of the config.

    Returns:
        The advantages of the step, float [4, 5].

    Raises:
        AssertionError: the estimator breaks its contract.
    """
    resolved = _resolved("advantage estimator", ADVANTAGE_REGISTRY.resolve, estimator, {}, 1)
    method = resolved if isinstance(resolved, AdvantageMethod) else AdvantageMethod(resolved)
    inputs = _advantage_inputs(method)
    before = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    result = method.estimate(inputs, gamma=0.9, lam=0.95, skip_masked=True, **arguments)
    expect(isinstance(result, Advantages), f"the estimator returned {type(result).__name__}, expected Advantages")
    _check_tokens("advantages", result.advantages, inputs.mask)
    if result.returns is not None:
        _check_tokens("returns", result.returns, None, inputs.mask.shape)
    expect((result.returns is None) is not method.critic, "returns must be given by an estimator with a critic and by no other")
    for name, value in before.items():
        expect(torch.equal(value, getattr(inputs, name)), f"the estimator changed its input {name}")
    order = torch.tensor([2, 0, 3, 1])
    reordered = replace(inputs, **{name: value[order] for name, value in before.items() if len(value) == len(order)})
    again = method.estimate(reordered, gamma=0.9, lam=0.95, skip_masked=True, **arguments).advantages
    expect(torch.allclose(again, result.advantages[order], atol=1e-6), "reordering the responses changes their advantages")
    return result


def check_kl_estimator(estimator: KLEstimator | str, **arguments: object) -> Tensor:
    """Check a KL kind on log-ratios from -3 to 3 nats.

    The result must have the shape of the input and be finite, elementwise, and 0 where the log-ratio is 0.

    Args:
        estimator: the function or its name in a config.
        arguments: `algorithm.kl.arguments` of the config.

    Returns:
        The estimates in nats, float [1, 7].

    Raises:
        AssertionError: the estimator breaks its contract.
    """
    function: KLEstimator = _resolved("KL estimator", KL_REGISTRY.resolve, estimator, arguments, 1)
    log_ratio = torch.linspace(-3, 3, 7)[None]
    result = function(log_ratio.clone())
    _check_tokens("the estimate", result, None, log_ratio.shape)
    expect(result[0, 3].abs() < 1e-6, f"a log-ratio of 0 has a KL of {result[0, 3]:g}, expected 0")
    alone = torch.cat([function(log_ratio[:, column : column + 1]) for column in range(7)], dim=1)
    expect(torch.allclose(alone, result, atol=1e-6), "a token has another KL alone than within the batch")
    return result


def _resolved(kind: str, resolve: Any, plugin: Any, arguments: Mapping[str, Any], positional: int) -> Any:
    """Resolve a name and bind arguments; mistakes become AssertionErrors."""
    try:
        found = resolve(plugin) if isinstance(plugin, str) else plugin
        return bind_arguments(kind, found, arguments, positional) if arguments else found
    except UserError as error:
        raise AssertionError(str(error)) from error


def _floats(inputs: LossInputs) -> list[tuple[str, Tensor]]:
    return [(name, values) for name, values in vars(inputs).items() if values.is_floating_point()]


def _check_tokens(what: str, values: Any, mask: Tensor | None, shape: torch.Size | None = None) -> None:
    expect(isinstance(values, Tensor), f"{what}: {type(values).__name__}, expected a tensor")
    wanted = tuple(mask.shape if mask is not None else shape or ())
    expect(tuple(values.shape) == wanted, f"{what}: shape {tuple(values.shape)}, expected {wanted}")
    expect(values.isfinite().all(), f"{what}: not finite")
    if mask is not None:
        expect((values[~mask] == 0).all(), f"{what}: not 0 outside the mask")


def _mask() -> Tensor:
    return torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


def _loss_inputs(rows: slice = slice(None)) -> LossInputs:
    """Random loss inputs, 0 outside the mask.

    The log-probs are close to the old ones, so that no clip range removes every gradient.
    """
    random, mask = torch.Generator().manual_seed(0), _mask()

    def draw(scale: float) -> Tensor:
        return torch.where(mask, scale * torch.randn(mask.shape, generator=random), 0.0)

    old = torch.where(mask, -draw(1.0).abs() - 0.1, 0.0)
    logprobs, ref, rollout, advantages, values = old + draw(1e-4), old + draw(0.1), old + draw(1e-3), draw(1.0), draw(1.0)
    selected = mask & (advantages > 0)
    tensors = [part[rows].clone() for part in (logprobs, old, advantages, mask, ref, rollout, values, selected)]
    return LossInputs(tensors[0].requires_grad_(), *tensors[1:])


def _advantage_inputs(method: AdvantageMethod) -> AdvantageInputs:
    random, mask = torch.Generator().manual_seed(0), _mask()
    scores = torch.tensor([1.0, 0.0, 0.5, 0.25])
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.where(last, scores[:, None], 0.0) - 0.01 * mask
    values = torch.where(mask, torch.randn(mask.shape, generator=random), 0.0) if method.critic else None
    groups, baselines = torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.3) if method.greedy else None
    parts, weights = (scores[:, None], torch.ones(1)) if method.parts else (None, None)
    return AdvantageInputs(rewards, scores, groups, mask, mask, values, baselines, None, parts, weights)
