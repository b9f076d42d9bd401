"""Generalized Jensen-Shannon divergence between teacher and student, in chunks of rows.

The teacher at each position is either its final hidden state and its output layer, from which the whole distribution is
recomputed, or its k most likely tokens and the total probability of all others. At most two chunks of logits exist at any time
(sizes in `logit_chunks.py`), and the backward pass recomputes them.

With p the teacher's and q the student's distribution, KL(p || q) = sum_v p(v) (log p(v) - log q(v)), whose gradient at the
student's logits is q - p. With k tokens K and a rest r it is sum_K p (log p - log q) + p_r (log p_r - log q_r), where q_r is
the student's probability of all tokens outside of K; its gradient is q - p inside of K and q (1 - p_r / q_r) outside.

The divergence of `beta` is beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2024, "On-
Policy Distillation of Language Models", eq. 1). 0 stands for KL(p || q) and 1 for KL(q || p), to which it is proportional near
both ends. Its derivative at q(v) is s(v) = (1 - beta) log(q(v) / m(v)), so its gradient at the logit of token v is
q(v) (s(v) - sum_u q(u) s(u)), where a token outside of K has the s of the rest. With beta 1, s is log(q / p).

Merging outcomes never raises any of them, so k tokens and a rest give a lower bound of the whole, and k = V makes them equal.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rayrlhf.models.logprobs import LayerGradients, chunk_buffer, chunks, logits_into, product_dtype
from rayrlhf.models.network_io import TeacherSignal


class Teacher(Protocol):
    """Teacher outputs at N positions."""

    def divergence(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """Return the divergence of some rows, float32 [n].

        `student` holds log-probs [n, V] and may be overwritten.
        """
        ...

    def gradient(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """Return the gradient of the divergence at the student's logits [n, V].

        The upstream gradient is 1. `student` holds log-probs [n, V] and is overwritten.
        """
        ...


@dataclass(frozen=True)
class FullTeacher:
    """Whole distribution of the teacher.

    Attributes:
        hidden: [N, H], final hidden states.
        weight: [V, H] of the teacher's output layer.
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @cached_property
    def _product(self) -> Tensor:
        """Weight in the forward pass's dtype: the backward pass may run outside of autocast."""
        return self.weight.to(product_dtype(self.hidden, self.weight))

    def divergence(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """See `Teacher.divergence`."""
        teacher = self._logprobs(rows, student.dtype)
        if beta:
            return _divergence(student, teacher, beta)
        student.neg_().add_(teacher)
        return student.mul_(teacher.exp_()).sum(-1)

    def gradient(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """See `Teacher.gradient`."""
        if beta:
            return _slopes(student, self._logprobs(rows, student.dtype), beta).mul_(student.exp_())
        return student.exp_().sub_(self._logprobs(rows, student.dtype).exp_())

    def _logprobs(self, rows: slice, dtype: torch.dtype) -> Tensor:
        hidden, product = self.hidden[rows], self._product
        buffer = torch.empty(len(hidden), len(product), dtype=dtype, device=hidden.device)
        logits = logits_into(hidden.to(product.dtype), product, self.bias, 1.0, buffer)
        return logits.sub_(logits.logsumexp(-1, keepdim=True))


@dataclass(frozen=True)
class TopTeacher:
    """Most likely tokens of the teacher, and all others as one outcome.

    Attributes:
        ids: int64 [N, K], different in each row.
        logprobs: [N, K + 1], of those tokens, and in the last column of all others together; -inf if there are none.
    """

    ids: Tensor
    logprobs: Tensor

    def divergence(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """See `Teacher.divergence`."""
        ids, logprobs = self.ids[rows], self.logprobs[rows].to(student.dtype)
        if beta:
            return _divergence(self._merged(student, ids), logprobs, beta)
        probabilities = logprobs.exp()
        known = probabilities[:, :-1] * (logprobs[:, :-1] - student.gather(-1, ids))
        rest = probabilities[:, -1] * (logprobs[:, -1] - _rest(student, ids))
        return known.sum(-1) + torch.where(probabilities[:, -1] > 0, rest, 0.0)

    def gradient(self, rows: slice, student: Tensor, beta: float = 0.0) -> Tensor:
        """See `Teacher.gradient`."""
        ids, logprobs = self.ids[rows], self.logprobs[rows].to(student.dtype)
        if beta:
            slopes = _slopes(self._merged(student, ids), logprobs, beta)
            inside = student.gather(-1, ids).exp_().mul_(slopes[:, :-1])
            return student.exp_().mul_(slopes[:, -1:]).scatter_(-1, ids, inside)
        inside = student.gather(-1, ids).exp_().sub_(logprobs[:, :-1].exp())
        # p_r / q_r overflows where the student gives the rest next to nothing; p_r * (q / q_r) never exceeds p_r.
        rest = _rest(student, ids).clamp(min=torch.finfo(student.dtype).min)[:, None]
        share = (student - rest).add_(logprobs[:, -1:]).exp_()
        return student.exp_().sub_(share).scatter_(-1, ids, inside)

    def _merged(self, student: Tensor, ids: Tensor) -> Tensor:
        """Return the student's log-probs of the same outcomes, [n, K + 1]."""
        return torch.cat([student.gather(-1, ids), _rest(student, ids)[:, None]], -1)


def divergence(hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, beta: float = 0.0) -> Tensor:
    """Return the divergence between teacher and student at each position, in nats.

    Gradients flow to the student's `hidden`, `weight` and `bias`.

    Args:
        hidden: [N, H], the student's final hidden state before each token.
        weight: [V, H] of the student's output layer; under autocast the product is computed in autocast's dtype.
        bias: [V] or None.
        teacher: teacher outputs at the same N positions, without gradient.
        beta: in [0, 1]; 0 is KL(teacher || student), 1 is KL(student || teacher).

    Returns:
        float32 [N], each >= 0 up to rounding.
    """
    return cast("Tensor", _Divergence.apply(hidden, weight, bias, teacher, beta))  # type: ignore[no-untyped-call]


@torch.no_grad()
def most_likely(hidden: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the fields of `TopTeacher`.

    They are ids, int64 [N, K], and log-probs, float32 [N, K + 1], with K = min(count, V).

    Args:
        hidden: [N, H], the teacher's final hidden states.
        weight: [V, H] of its output layer.
        bias: [V] or None.
        count: tokens to keep.
    """
    count = min(count, len(weight))
    ids = torch.empty(len(hidden), count, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(len(hidden), count + 1, dtype=torch.float32, device=hidden.device)
    buffer, product = chunk_buffer(hidden, weight), weight.to(product_dtype(hidden, weight))
    for rows in chunks(len(hidden), len(buffer)):
        logits = logits_into(hidden[rows].to(product.dtype), product, bias, 1.0, buffer)
        logits.sub_(logits.logsumexp(-1, keepdim=True))
        logprobs[rows, :-1], ids[rows] = logits.topk(count, dim=-1)
        logprobs[rows, -1] = logits.scatter_(-1, ids[rows], -torch.inf).logsumexp(-1)
    return ids, logprobs


class _Divergence(torch.autograd.Function):
    """Chunked forward that keeps one number per row; chunked backward that recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, beta: float) -> Tensor:
        dtype = product_dtype(hidden, weight)
        log_normalizer = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        result = torch.empty_like(log_normalizer)
        buffer, product = chunk_buffer(hidden, weight), weight.detach().to(dtype)
        for rows in chunks(len(hidden), len(buffer)):
            logits = logits_into(hidden[rows].to(dtype), product, bias, 1.0, buffer)
            log_normalizer[rows] = logits.logsumexp(-1)
            result[rows] = teacher.divergence(rows, logits.sub_(log_normalizer[rows, None]), beta)
        ctx.save_for_backward(hidden, weight, bias, log_normalizer)
        ctx.teacher, ctx.beta, ctx.dtype = teacher, beta, dtype
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [upstream] = gradients
        hidden, weight, bias, log_normalizer = ctx.saved_tensors
        buffer, product = chunk_buffer(hidden, weight), weight.detach().to(ctx.dtype)
        total = LayerGradients(ctx.needs_input_grad, hidden, weight, bias, product)
        for rows in chunks(len(hidden), len(buffer)):
            inputs = hidden[rows].to(ctx.dtype)
            student = logits_into(inputs, product, bias, 1.0, buffer).sub_(log_normalizer[rows, None])
            gradient = ctx.teacher.gradient(rows, student, ctx.beta).mul_(upstream[rows, None])
            total.add(rows, gradient, inputs)
        return total.hidden, total.weight, total.bias, None, None


def divergence_from(
    hidden: Tensor,
    head: tuple[Tensor, Tensor | None],
    teacher: TeacherSignal,
    teacher_layer: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    """Return the divergence at final hidden states [N, H], float32 [N].

    Args:
        hidden: of the student.
        head: weight and bias of the student's output layer.
        teacher: teacher outputs at the same positions.
        teacher_layer: weight and bias of the teacher's output layer, for its hidden states.

    Raises:
        ValueError: the teacher's output layer is missing.
    """
    if teacher.ids is not None and teacher.logprobs is not None:
        return divergence(hidden, *head, TopTeacher(teacher.ids, teacher.logprobs), teacher.beta)
    if teacher.hidden is None or teacher_layer is None:
        raise ValueError("a teacher's hidden states need its output layer: expected teacher_layer to be set")
    return divergence(hidden, *head, FullTeacher(teacher.hidden, *teacher_layer), teacher.beta)


def _log_mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return log(beta p + (1 - beta) q), and log p for beta 1."""
    if beta == 1:
        return teacher
    return torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the divergence [n] of log-probs [n, O], for beta above 0."""
    mixture = _log_mixture(student, teacher, beta)
    reverse = _expected(student, student - mixture)
    return reverse if beta == 1 else beta * _expected(teacher, teacher - mixture) + (1 - beta) * reverse


def _slopes(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return s minus its mean under the student, [n, O]; see the module."""
    gap = student - _log_mixture(student, teacher, beta)
    slopes = gap if beta == 1 else gap * (1 - beta)
    # An outcome without tokens, the rest where k = V, has log-probs of -inf.
    slopes = slopes.masked_fill(student == -torch.inf, 0.0)
    return slopes - _expected(student, slopes)[:, None]


def _expected(logprobs: Tensor, values: Tensor) -> Tensor:
    """Return the mean of values [n, O] over outcomes, [n].

    Those with log-probs of -inf add nothing.
    """
    return (logprobs.exp() * values.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def _rest(student: Tensor, ids: Tensor) -> Tensor:
    """Return the student's log-probability of all tokens except `ids`, [n]."""
    return student.scatter(-1, ids, -torch.inf).logsumexp(-1)
