"""Chunked log-probs, entropy and KL against the plain formulas on whole logits."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.models import logprobs as module
from rayrlhf.models.logit_chunks import chunk_bytes
from rayrlhf.models.logprobs import logprobs_and_entropy

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


def problem(rows: int, vocabulary: int, seed: int, *, bias: bool, dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return (
        draw(rows, 8),
        draw(vocabulary, 8),
        draw(vocabulary) if bias else None,
        torch.randint(0, vocabulary, (rows,), generator=generator),
    )


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 23 * 3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 17),
    vocabulary=st.integers(2, 40),
    chunk=st.integers(1, 700),
    temperature=st.floats(0.3, 3.0),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_those_of_log_softmax_for_any_chunk(
    rows: int, vocabulary: int, chunk: int, temperature: float, bias: bool, seed: int
) -> None:
    inputs = problem(rows, vocabulary, seed, bias=bias)
    weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))

    def evaluate(function, dtype):
        cast = [tensor if tensor is None or not tensor.is_floating_point() else tensor.to(dtype) for tensor in inputs]
        leaves = [tensor for tensor in cast[:3] if tensor is not None]
        logprobs, entropy = function(*cast)
        loss = (logprobs * weights[0] + entropy * weights[1]).sum()
        return [tensor.double() for tensor in (logprobs, entropy, *torch.autograd.grad(loss, leaves))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        chunked = evaluate(lambda *cast: logprobs_and_entropy(*cast, temperature=temperature), torch.float32)
    whole = evaluate(lambda *cast: plain(*cast, temperature), torch.float32)
    exact = evaluate(lambda *cast: plain(*cast, temperature), torch.float64)
    for found, rounded, expected in zip(chunked, whole, exact, strict=True):
        if expected.numel():
            # Both round: what is asked is to be as near to the exact numbers as the plain formula is in the same precision.
            scale = max(1.0, expected.abs().max().item())
            assert (found - expected).abs().max() <= 2e-6 * scale + 2 * (rounded - expected).abs().max()


@pytest.mark.usefixtures("small_chunks")
def test_the_gradient_agrees_with_finite_differences() -> None:
    hidden, weight, bias, targets = problem(4, 7, 0, bias=True, dtype=torch.float64)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, bias, targets, temperature=0.7)
    loss = (logprobs * 0.3 - entropy * 0.2).sum()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, hidden)

    def at(step: float) -> torch.Tensor:
        moved = plain(hidden.detach() + step * direction, weight.detach(), bias.detach(), targets, 0.7)
        return (moved[0] * 0.3 - moved[1] * 0.2).sum()

    numeric = (at(1e-5) - at(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-4)


def test_each_side_alone_gets_its_gradient() -> None:
    inputs = problem(6, 11, 3, bias=False)
    for which in (0, 1):
        expected = torch.autograd.grad(plain(*inputs, 1.0)[which].sum(), inputs[0])[0]
        found = torch.autograd.grad(logprobs_and_entropy(*inputs)[which].sum(), inputs[0])[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    frozen = logprobs_and_entropy(inputs[0], inputs[1].detach(), None, inputs[3], entropy=False)[0]
    assert torch.autograd.grad(frozen.sum(), inputs[0])[0].abs().sum() > 0


def test_logits_of_all_positions_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50 * 2)
    shapes = []
    original = module.logits_into

    def spy(*arguments: torch.Tensor) -> torch.Tensor:
        logits = original(*arguments)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(module, "logits_into", spy)
    inputs = problem(9, 50, 0, bias=False)
    logprobs_and_entropy(*inputs)[0].sum().backward()
    assert max(rows for rows, _ in shapes) == 2
    assert sum(rows for rows, _ in shapes) == 2 * 9


def test_a_bfloat16_product_keeps_float32_probabilities() -> None:
    inputs = problem(5, 33, 2, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = logprobs_and_entropy(*inputs)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = plain(inputs[0].bfloat16().float(), inputs[1].bfloat16().float(), None, inputs[3], 1.0)[0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0.05)
    gradient = torch.autograd.grad(logprobs.sum(), inputs[1])[0]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(*inputs, 1.0)[0].sum(), inputs[1])[0], rtol=0, atol=0.15)


def test_a_float32_output_layer_is_exact_under_autocast_for_weights_of_the_engine() -> None:
    hidden, weight, bias, targets = problem(5, 33, 2, bias=True)
    rounded = weight.detach().bfloat16().float().requires_grad_()
    expected = plain(hidden, rounded, bias, targets, 1.0)[0]
    gradients = torch.autograd.grad(expected.sum(), (hidden, rounded, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = logprobs_and_entropy(hidden, weight, bias, targets, float32=True)
        held, _ = logprobs_and_entropy(hidden, weight.detach().bfloat16(), bias, targets, float32=True)
    for one, other in zip(
        (found, held, *torch.autograd.grad(found.sum(), (hidden, weight, bias))), (expected, expected, *gradients), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        logprobs_and_entropy(*problem(2, 3, 0, bias=False), temperature=0.0)


def allocated() -> int:
    """Bytes that the C allocator has given out in its main arena."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Info
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_ever_new_numbers_of_tokens_leave_nothing_behind_in_bfloat16() -> None:
    torch.manual_seed(0)
    weight = torch.randn(259, 64, requires_grad=True)

    def read(rows: int) -> None:
        hidden = torch.randn(rows, 64, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, entropies = logprobs_and_entropy(hidden, weight, None, torch.randint(0, 259, (rows,)))
        (logprobs.sum() + entropies.sum()).backward()

    for rows in (64, 128, 192, 200):
        read(rows)
    before = allocated()
    for rows in range(30, 200):
        read(rows)
    assert (allocated() - before) / 170 < 2048


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_padding_of_products_changes_no_row_in_bfloat16(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    weight, hidden = torch.randn(259, 64), torch.randn(rows, 64)
    targets = torch.randint(0, 259, (rows,))

    def read() -> tuple[torch.Tensor | None, ...]:
        inputs, matrix = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, entropies = logprobs_and_entropy(inputs, matrix, None, targets)
        (logprobs.sum() + entropies.sum()).backward()
        return logprobs, entropies, inputs.grad, matrix.grad

    padded = read()
    monkeypatch.setattr(module, "padded", lambda rows, _: rows)
    for mine, plain in zip(padded, read(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-2, atol=1e-2)


def test_a_chunk_follows_the_memory_of_the_device(monkeypatch):
    sizes = {memory: chunk_bytes(memory and memory * 2**30) for memory in (None, 1, 16, 80, 141)}
    assert sizes == {None: 24 * 2**20, 1: 24 * 2**20, 16: 2**28, 80: 2**30, 141: 2**30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    assert module._chunk_rows(152_000, torch.device("cuda")) == 2**30 // (4 * 152_000)
    assert module._chunk_rows(152_000, torch.device("cpu")) == 41
