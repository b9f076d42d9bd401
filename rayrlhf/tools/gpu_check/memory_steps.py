"""Steps 5 and 6: memory that returns to the device, weights in another process."""

import time
from collections.abc import Iterator

import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.tools.gpu_check.neighbor_process import MIB, Neighbor, bits, neighbor, receive, running
from rayrlhf.tools.gpu_check.random_work import logprobs_of, random_sequences, tiny_model, train_engine
from rayrlhf.tools.gpu_check.step_result import Figure
from rayrlhf.tools.gpu_check.training_steps import LENGTHS, update

CLOSE = 64.0
"""MiB that may stay: blocks that hold the last results, and what other processes do."""
LONG_LENGTHS = (1024,) * 8
"""Samples of an update whose activations take some GiB."""


def returned_memory(device: torch.device) -> Iterator[Figure]:
    """Compare the device's free memory before and after turns and updates."""
    with neighbor(device) as other:
        yield from memory_figures(device, other)


def memory_figures(device: torch.device, other: Neighbor) -> Iterator[Figure]:
    """Yield what an offloaded reference and a policy leave on the device."""
    path, sequences = tiny_model(device), random_sequences(LENGTHS)
    logprobs_of(FrozenEngine(ModelSection(path=path, dtype="bfloat16"), 8192, offload=True), sequences)  # libraries load
    before = other.free_mib()
    reference = FrozenEngine(ModelSection(path=path, dtype="bfloat16"), 8192, offload=True)
    logprobs_of(reference, sequences)
    yield Figure("left by an offloaded reference", before - other.free_mib(), "MiB", at_most=CLOSE, headline=True)
    policy = train_engine(path, device, "bfloat16")
    free = []
    for _ in range(2):
        update(policy, LENGTHS if device.type == "cpu" else LONG_LENGTHS)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # as actors that share a GPU do at the end of each call
        free.append(other.free_mib())
    yield Figure("left by a further update", free[0] - free[1], "MiB", at_most=CLOSE, headline=True)
    if device.type == "cuda":
        peak, kept, held = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        yield Figure("peak of an update", peak / MIB, "MiB")
        yield Figure("share of the peak's temporary memory that goes back", (peak - kept) / (peak - held), at_least=0.5)


def transfer(device: torch.device) -> Iterator[Figure]:
    """Send all weights to another process, by CUDA IPC on a GPU.

    They are gathered in main memory as well.
    """
    engine = train_engine(tiny_model(device), device, "bfloat16")
    size = sum(tensor.nbytes for _, tensor in engine.device_weights("bfloat16"))
    with running(receive, device) as connection:
        connection.send(None)
        connection.recv()  # it has started
        wrong = 0
        for _ in range(2):  # the first pass opens the device in the other process
            seconds = 0.0
            for _, tensor in engine.device_weights("bfloat16"):
                own = tensor.clone()
                expected = bits(own)  # before the clock, as it also waits for the copy
                seconds -= time.perf_counter()
                connection.send(own)
                connection.recv()
                seconds += time.perf_counter()
                wrong += int(connection.recv()) != expected
    yield Figure("tensors that arrived with other bits", float(wrong), at_most=0)
    yield Figure("weights by CUDA IPC, tensor by tensor", size / seconds / 1e9, "GB/s", headline=True)
    started = time.perf_counter()
    gathered = sum(tensor.nbytes for bucket in engine.weight_buckets(dtype="bfloat16") for _, tensor in bucket)
    yield Figure("weights into main memory", gathered / (time.perf_counter() - started) / 1e9, "GB/s", headline=True)
    yield Figure("bytes gathered of those sent", gathered / size, at_least=1.0, at_most=1.0)
