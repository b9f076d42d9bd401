"""Steps 2 and 3: log-prob head against `log_softmax`, packed rows against single samples."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import TokenSequence
from rayrlhf.engines.scoring.frozen import autocast
from rayrlhf.engines.train.collate import collate
from rayrlhf.models.logprobs import logprobs_and_entropy
from rayrlhf.models.network import Network, build_network
from rayrlhf.models.packed_attention import NAME, Segments
from rayrlhf.tools.gpu_check.neighbor_process import MIB
from rayrlhf.tools.gpu_check.random_work import peak_bytes, random_sequences, timed, tiny_model
from rayrlhf.tools.gpu_check.step_result import Figure

QWEN_VOCABULARY = 151_936
KERNELS = ("flash", "cudnn", "efficient", "math")
"""Kernels of `scaled_dot_product_attention`, as they appear in the names of its operators."""
PRECISIONS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def head(device: torch.device) -> Iterator[Figure]:
    """Compare the chunked log-prob head and its gradients with `log_softmax`.

    Both round the logits to the same dtype. A bfloat16 logit of 4 to 8 has steps of 0.031, and another order of the sum may
    end in the next one.
    """
    rows, width, vocabulary = (48, 32, 517) if device.type == "cpu" else (4096, 1024, QWEN_VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    for dtype in PRECISIONS:
        name, exact = str(dtype).removeprefix("torch."), dtype == torch.float32
        with autocast(device, dtype):
            ours, whole = (_head_outputs(one, hidden, weight, targets) for one in (_chunked_head, _whole_head))
            gaps = [float((mine - wanted).abs().max()) for mine, wanted in zip(ours[:2], whole[:2], strict=True)]
            yield Figure(f"largest log-prob gap, {name}", gaps[0], "nats", at_most=1e-4 if exact else 0.05)
            yield Figure(f"largest entropy gap, {name}", gaps[1], "nats", at_most=1e-4 if exact else 0.05)
            for role, mine, wanted in zip(("hidden", "weight"), ours[2:], whole[2:], strict=True):
                gap = relative_gap(mine, wanted)
                yield Figure(f"relative gradient gap of {role}, {name}", gap, at_most=1e-4 if exact else 0.02)
            works = {
                "chunks": lambda: _head_outputs(_chunked_head, hidden, weight, targets),
                "one chunk": lambda: _head_outputs(_whole_head, hidden, weight, targets),
            }
            for label, work in works.items():
                yield Figure(f"head in {label}, {name}", 1e3 * timed(device, work), "ms")
            if device.type == "cuda":
                peaks = [peak_bytes(device, work) for work in works.values()]
                yield Figure(f"peak of head in chunks, {name}", peaks[0] / MIB, "MiB", at_most=0.6 * peaks[1] / MIB)


def _head_outputs(compute: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return log-probs, entropies and the gradients of the mean of both."""
    logprobs, entropies = compute(hidden, weight, targets)
    gradients = torch.autograd.grad((logprobs + entropies).mean(), (hidden, weight))
    return logprobs.detach(), entropies.detach(), *gradients


def _chunked_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs_and_entropy(hidden, weight, None, targets)


def _whole_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def relative_gap(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted|, both as vectors."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def packing(device: torch.device) -> Iterator[Figure]:
    """Compare packed rows with single samples, name the attention kernel, time layouts."""
    lengths = (20, 33, 47) if device.type == "cpu" else (128, 513, 900, 1024)
    sequences = random_sequences(lengths)
    network = build_network(ModelSection(path=tiny_model(device)), frozenset({"lm"}), "zero", 0)
    network.accept_packed_rows()
    network.to(device)
    yield Figure("layout of the model", network.check.layout, among=("packed",))
    for dtype in PRECISIONS:
        name, exact = str(dtype).removeprefix("torch."), dtype == torch.float32
        with autocast(device, dtype):
            together = _scores(network, sequences, device, packed=True)
            alone = [_scores(network, [one], device) for one in sequences]
            gap = float((together[0] - torch.cat([logprobs for logprobs, _ in alone])).abs().max())
            gradient = torch.stack([own for _, own in alone]).sum(0)
            yield Figure(f"largest log-prob gap, {name}", gap, "nats", at_most=1e-3 if exact else 0.2)
            gap = relative_gap(together[1], gradient)
            yield Figure(f"relative gradient gap, {name}", gap, at_most=1e-3 if exact else 0.05)
            names = _operators(device, lambda: _scores(network, sequences, device, packed=True))
            # On CPUs bfloat16 has a kernel of this package.
            if exact or device.type == "cuda":
                allowed = () if exact else ("flash", "cudnn")
                yield Figure(f"attention kernel, {name}", kernel_of(names), among=allowed, headline=True)
            for label, packed in (("padded", False), ("packed", True)):
                seconds = timed(device, lambda packed=packed: _scores(network, sequences, device, packed=packed))  # type: ignore[misc]
                yield Figure(f"forward and backward, {label}, {name}", 1e3 * seconds, "ms")
    yield from _attention_times(device, lengths)


def _scores(
    network: Network, sequences: list[TokenSequence], device: torch.device, *, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probs of all responses, and the gradient of their sum at the embedding."""
    network.zero_grad()
    width = max(sequence.response_length for sequence in sequences)
    batch = collate(sequences, width, device, packed=packed)
    logprobs = network(batch.input_ids, batch.positions, frozenset({"logprobs"})).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), network.model.get_input_embeddings().weight.grad.clone()


def _operators(device: torch.device, work: Callable[[], object]) -> set[str]:
    """Return the names of all operators and kernels of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    return {event.key for event in profile.key_averages()}


def kernel_of(names: Iterable[str]) -> str:
    """Return the slowest attention kernel among operator names, or `none`."""
    attention = [name.lower() for name in names if "attention" in name.lower() or "flash" in name.lower()]
    found = [kernel for kernel in KERNELS if any(kernel in name for name in attention)]
    return found[-1] if found else "none"


def _attention_times(device: torch.device, lengths: Sequence[int]) -> Iterator[Figure]:
    """Time attention alone in bfloat16, padded and packed.

    Packed rows are computed by our loop over samples and by torch's variable-length kernel.
    """
    from transformers import AttentionInterface

    heads, size, total = 16, 64, sum(lengths)
    query = torch.randn(1, heads, total, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    segments = Segments.of(list(lengths), None, device)

    def run(attend: Callable[[], Tensor]) -> None:
        attend().sum().backward()  # type: ignore[no-untyped-call]

    rows = torch.randn(len(lengths), heads, max(lengths), size, device=device, dtype=torch.bfloat16, requires_grad=True)
    module, by_sample = torch.nn.Module(), AttentionInterface()[NAME]
    layouts: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: scaled_dot_product_attention(rows, rows, rows, is_causal=True),
        "packed, by sample": lambda: by_sample(module, query, query, query, None, segments=segments)[0],
    }
    try:
        layouts["packed, varlen_attn"] = _varlen_attention(query, lengths)
    except (ImportError, RuntimeError, TypeError) as error:
        yield Figure("attention, packed, varlen_attn", f"not measured: {str(error).splitlines()[0]}")
    for label, attend in layouts.items():
        yield Figure(f"attention, {label}", 1e3 * timed(device, lambda attend=attend: run(attend)), "ms")  # type: ignore[misc]


def _varlen_attention(query: Tensor, lengths: Sequence[int]) -> Callable[[], Tensor]:
    """Return causal attention of a packed row by torch's variable-length kernel, tried out once.

    Raises:
        ImportError: this torch has none, or the device is a CPU.
        RuntimeError: the kernel refuses the device.
        TypeError: its arguments are others in this version.
    """
    if query.device.type == "cpu":
        raise ImportError("CUDA only")
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 asks for `is_causal`, 2.12 for a window.
    named = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}
    starts = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    flat = query[0].transpose(0, 1).detach().contiguous().requires_grad_()

    def attend() -> Tensor:
        return cast("Tensor", varlen_attn(flat, flat, flat, starts, starts, max(lengths), max(lengths), **causal))

    attend()
    return attend
