"""Log-probs, entropy and KL from hidden states, in chunks of rows of the vocabulary.

The logits of a batch are by far the largest tensor of RLHF (tokens x vocabulary), but each row is needed only for one log-prob
and one entropy. So the output layer is applied to the response positions only, a chunk of logits at a time in one reused buffer
(`logit_chunks.py` has its size), and the backward pass recomputes each chunk. Memory does not depend on the number of tokens,
and the cost of new memory pages (as much as the arithmetic, on a CPU) is avoided.

Ranks that share the vocabulary (Shoeybi et al. 2019, "Megatron-LM", section 3) each compute normalizer L_r, entropy S_r and the
targets' logits over their own rows, and exchange these three numbers per position. With L = logsumexp of all L_r and the
probability of a rank's rows w_r = exp(L_r - L), the entropy is sum over r of w_r (S_r - log w_r).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rayrlhf.models.logit_chunks import CHUNK_BYTES, chunk_bytes

ROWS = 64
"""Reduced-precision products on a CPU have a multiple of this many rows, or a whole chunk."""


class VocabularyPart(NamedTuple):
    """Rows of an output layer that this rank has.

    Attributes:
        group: ranks that share them.
        first: index of the first.
    """

    group: Any
    first: int

    def combined(self, log_normalizer: Tensor, picked: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalizer, target logits and entropies [N] over all ranks' rows."""
        own = torch.stack([log_normalizer, picked, entropies])
        every = own.new_empty(torch.distributed.get_world_size(self.group), *own.shape)
        torch.distributed.all_gather_into_tensor(every.view(-1), own.view(-1), group=self.group)
        total = every[:, 0].logsumexp(0)
        log_shares = every[:, 0] - total
        return total, every[:, 1].sum(0), (log_shares.exp() * (every[:, 2] - log_shares)).sum(0)


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    entropy: bool = True,
    part: VocabularyPart | None = None,
    float32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy of softmax(logits / temperature).

    Args:
        hidden: [N, H], final hidden state that predicts each target.
        weight: [V, H] of the output layer; under autocast the product is computed in autocast's dtype, the rest in float32.
        bias: [V] of the output layer, or None.
        targets: int64 [N].
        temperature: > 0.
        cap: soft cap of the logits z, which become cap x tanh(z / cap) before the temperature; None leaves them.
        entropy: compute the entropy.
        part: the rows that `weight` and `bias` have of the output layer; None for all.
        float32: compute the product in float32 also under autocast, of weights rounded as for autocast: the rollout engine has
            no others.

    Returns:
        float32 [N] log-probs, and float32 [N] entropies in nats (zeros if `entropy` is False). Both carry gradients to
        `hidden`, `weight` and `bias`.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    dtype = product_dtype(hidden, weight)
    result = _LogprobsAndEntropy.apply(hidden, weight, bias, targets, temperature, cap, entropy, part, dtype, float32)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", result)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Chunked forward that keeps one number per row; chunked backward that recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        cap: float | None,
        entropy: bool,
        part: VocabularyPart | None,
        dtype: torch.dtype,
        float32: bool,
    ) -> tuple[Tensor, Tensor]:
        owned = None
        if part is not None:
            targets = targets - part.first
            owned = (targets >= 0) & (targets < len(weight))
            targets = targets.clamp(0, len(weight) - 1)
        log_normalizer = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        picked, entropies = torch.empty_like(log_normalizer), torch.zeros_like(log_normalizer)
        buffer, product = chunk_buffer(hidden, weight), _factor(weight, dtype, float32)
        for rows in chunks(len(hidden), len(buffer)):
            logits = logits_into(hidden[rows].to(product.dtype), product, bias, temperature, buffer, cap)
            log_normalizer[rows] = logits.logsumexp(-1)
            picked[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1)
            if entropy:
                logits.sub_(log_normalizer[rows, None])
                entropies[rows] = -(logits.exp() * logits).sum(-1)
        if part is not None and owned is not None:
            log_normalizer, picked, whole = part.combined(log_normalizer, picked.where(owned, 0.0), entropies)
            entropies = whole if entropy else entropies
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizer, entropies, owned)
        ctx.temperature, ctx.cap, ctx.dtypes, ctx.part = temperature, cap, (dtype, float32), part
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return picked - log_normalizer, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob_gradient, entropy_gradient = gradients
        hidden, weight, bias, targets, log_normalizer, entropies, owned = ctx.saved_tensors
        own_gradient = logprob_gradient if logprob_gradient is None or owned is None else logprob_gradient * owned
        buffer, product = chunk_buffer(hidden, weight), _factor(weight, *ctx.dtypes)
        total = LayerGradients(ctx.needs_input_grad, hidden, weight, bias, product)
        for rows in chunks(len(hidden), len(buffer)):
            inputs = hidden[rows].to(product.dtype)
            logits = logits_into(inputs, product, bias, ctx.temperature, buffer, ctx.cap)
            # d (cap tanh(z / cap)) / dz = 1 - (capped / cap)^2
            slope = None if ctx.cap is None else 1 - (logits * (ctx.temperature / ctx.cap)) ** 2
            logits.sub_(log_normalizer[rows, None])
            gradient = _logit_gradient(
                logits,
                targets[rows],
                entropies[rows],
                None if logprob_gradient is None else logprob_gradient[rows],
                None if own_gradient is None else own_gradient[rows],
                None if entropy_gradient is None else entropy_gradient[rows],
            ).div_(ctx.temperature)
            if slope is not None:
                gradient.mul_(slope)
            total.add(rows, gradient, inputs)
        if ctx.part is not None and total.hidden is not None:
            torch.distributed.all_reduce(total.hidden, group=ctx.part.group)
        return total.hidden, total.weight, total.bias, None, None, None, None, None, None, None


def _factor(weight: Tensor, dtype: torch.dtype, float32: bool) -> Tensor:
    product = weight.detach().to(dtype)
    return product.float() if float32 else product


def _logit_gradient(
    logprobs: Tensor,
    targets: Tensor,
    entropies: Tensor,
    logprob_gradient: Tensor | None,
    own_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
) -> Tensor:
    """Return the gradient at the scaled logits z, in place if possible.

    `own_gradient` is `logprob_gradient`, 0 where the target is in the rows of another rank.
    With p = softmax(z) and entropy S: d log p(y) / dz = onehot(y) - p, and dS / dz = -p * (log p + S).
    """
    if entropy_gradient is not None:
        surprise = (logprobs + entropies[:, None]).mul_(-entropy_gradient[:, None])
        if logprob_gradient is not None:
            surprise.sub_(logprob_gradient[:, None])
        gradient = surprise.mul_(logprobs.exp_())
    elif logprob_gradient is not None:
        gradient = logprobs.exp_().mul_(-logprob_gradient[:, None])
    else:
        return logprobs.zero_()
    if own_gradient is not None:
        gradient.scatter_add_(-1, targets[:, None], own_gradient[:, None])
    return gradient


def logits_into(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, buffer: Tensor, cap: float | None = None
) -> Tensor:
    """Write float32 [n, V] capped logits / temperature to the first rows of `buffer`."""
    logits = buffer[: len(hidden)]
    if hidden.dtype == weight.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_((padded(hidden.to(weight.dtype), len(weight)) @ weight.t())[: len(hidden)])
    if bias is not None:
        logits.add_(bias)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if temperature == 1.0 else logits.div_(temperature)


def add_product(total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add gradient.T @ inputs to `total`, for any dtypes."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), inputs)
    else:
        total.add_(padded(gradient, len(total)).t() @ padded(inputs, len(total)))


class LayerGradients:
    """Gradients of an output layer, added up over chunks of rows.

    Attributes:
        hidden: [N, H] of its inputs; None if not needed.
        weight: [V, H]; None if not needed.
        bias: [V]; None if not needed.
    """

    def __init__(self, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
        self._product = product

    def add(self, rows: slice, gradient: Tensor, inputs: Tensor) -> None:
        """Add a chunk: the float32 gradient of its logits [n, V], its inputs [n, H]."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(self._product.dtype)
        if self.hidden is not None:
            own = padded(gradient, len(self._product)) @ self._product
            self.hidden[rows] = own[: len(inputs)].to(self.hidden.dtype)
        if self.weight is not None:
            add_product(self.weight, gradient, inputs)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of products: autocast's if enabled, else the wider one of the factors."""
    kind = weight.device.type
    return (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(hidden.dtype, weight.dtype)
    )


def padded(rows: Tensor, vocabulary: int) -> Tensor:
    """Append zero rows to [n, *], up to one of a few row counts.

    oneDNN compiles a kernel for every shape and keeps the last thousand. Without padding, a policy whose responses have a new
    total of tokens at each step would grow by tens of kilobytes per optimizer step, and wait for the compiler.
    """
    if rows.device.type != "cpu" or rows.element_size() > 2:
        return rows
    wanted = min(-(-len(rows) // ROWS) * ROWS, _chunk_rows(vocabulary, rows.device))
    return torch.nn.functional.pad(rows, (0, 0, 0, wanted - len(rows)))


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    size = chunk_bytes(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else CHUNK_BYTES
    return max(1, size // (4 * vocabulary))


def chunk_buffer(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return memory for a chunk of logits, float32 [n, V]."""
    rows = min(len(hidden), _chunk_rows(len(weight), weight.device))
    return torch.empty(rows, len(weight), dtype=torch.float32, device=weight.device)


def chunks(total: int, rows: int) -> Iterator[slice]:
    """Yield the row range of each chunk."""
    return (slice(start, start + rows) for start in range(0, total, rows)) if rows else iter(())
