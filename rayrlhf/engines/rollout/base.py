"""Rollout engine protocol: one process samples from one model, without Ray."""

from collections.abc import Sequence
from typing import Any, Protocol

from rayrlhf.data.records import Rollout, RolloutRequest
from rayrlhf.weight_sync.buckets import WeightBucket


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
