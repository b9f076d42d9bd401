"""What an engine is: one process's work on one model, without Ray. Actors wrap these; tests call them in-process."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch

from rayrlhf.data.records import Rollout, RolloutRequest, TokenScores
from rayrlhf.data.records import Sequence as TokenSequence

Want = Literal["logprobs", "entropy", "values", "hidden"]
WeightBucket = list[tuple[str, torch.Tensor]]
"""Named tensors in Hugging Face checkpoint naming, contiguous, on the CPU unless a GPU transfer says otherwise."""


class ScoreEngine(Protocol):
    """A model that reads sequences."""

    def score(
        self, sequences: Sequence[TokenSequence], want: frozenset[Want], *, temperature: float = 1.0, reference: bool = False
    ) -> list[TokenScores]:
        """Score sequences without gradient, in the order given; `reference` switches LoRA adapters off."""
        ...


class RolloutEngine(Protocol):
    """A sampler. One thread calls it: `submit`, then `poll` until nothing is unfinished; weights change between polls."""

    version: int
    """Weight version it samples with; -1 before the first load means the start weights."""

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Queue requests. Temperature 0 is greedy."""
        ...

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Decode until at least `minimum` requests are finished, or none is left; return all finished since the last poll.

        After `seconds` no further token is begun.
        """
        ...

    def cancel(self) -> None:
        """Drop all unfinished requests."""
        ...

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        ...

    def sleep(self) -> None:
        """Give back the memory of weights and cache, if the backend can, until new weights come; nothing is unfinished."""
        ...

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Requests may be unfinished only where the spec says that they continue: the rest of their tokens then comes from the new
        version, which reads what stands before them anew.
        """
        ...

    def receive_weights(self, bucket: WeightBucket) -> None:
        """Take one bucket in. The tensors are read-only and only valid during the call."""
        ...

    def finish_weights(self) -> None:
        """Make the new version current: re-pack what the backend packs, and drop the prefix cache."""
        ...

    def close(self) -> None:
        """Free the engine's processes and memory."""
        ...


class TransferEngine(RolloutEngine, Protocol):
    """A sampler that can also be sent weights from GPU to GPU."""

    @property
    def weight_client(self) -> Any:
        """The door for them, with the calls of vLLM's `VLLMWeightSyncClient`."""
        ...


class WeightSource(Protocol):
    """Something that can hand out its weights for rollouts."""

    def weight_buckets(self, bucket_bytes: int = 256 * 2**20) -> Iterator[WeightBucket]:
        """Yield the merged weights (LoRA folded in), every rank taking part, rank 0's buckets being the ones to ship."""
        ...


def bucketed(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group named tensors into buckets of about `bucket_bytes`; a tensor larger than that is a bucket of its own."""
    bucket: WeightBucket = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes
    if bucket:
        yield bucket
