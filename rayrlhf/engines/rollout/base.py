"""Rollout engine protocol: one process samples from one model, without Ray."""

from collections.abc import Sequence
from typing import Any, Protocol

from rayrlhf.data.records import Float32, Int32, Rollout, RolloutRequest
from rayrlhf.weight_sync.buckets import WeightBucket


class RolloutEngine(Protocol):
    """Generates responses. One thread calls it: `submit`, then `poll` until nothing is unfinished.

    Weights change between polls. An engine that samples under `RolloutRequest.constraint` has an attribute `constrains`, True.
    """

    version: int
    """Weight version in use; -1 means the initial weights, before the first load."""

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Queue requests.

        Temperature 0 is greedy. A request's `stop` strings end its response like those of the spec.
        """
        ...

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Decode until at least `minimum` requests are finished, or none is left.

        No further token is begun after `seconds`.

        Returns:
            All requests finished since the last poll.
        """
        ...

    def cancel(self) -> int:
        """Drop all unfinished requests; returns the tokens that were sampled for them."""
        ...

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        ...

    def sleep(self) -> None:
        """Free the memory of weights and cache until new weights arrive, if the backend can.

        Nothing may be unfinished.
        """
        ...

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Requests may be unfinished only if the spec lets them continue: their remaining tokens then come from the new version,
        which recomputes the keys and values of the tokens before them.
        """
        ...

    def receive_weights(self, bucket: WeightBucket) -> None:
        """Load one bucket. The tensors are read-only and only valid during the call."""
        ...

    def finish_weights(self) -> None:
        """Activate the new version: re-pack weights, if needed, and drop the prefix cache."""
        ...

    def close(self) -> None:
        """Free the engine's processes and memory."""
        ...


class LabelEngine(RolloutEngine, Protocol):
    """Rollout engine that returns log-probs of chosen next tokens, as a judge needs them."""

    def next_logprobs(self, prompts: Sequence[Int32], tokens: Sequence[int]) -> Float32:
        """Return the log-probs of `tokens` right after each prompt, float32 [B, K].

        They are in nats at temperature 1. Prompts must fit into the context with one token more, and nothing may be unfinished.
        """
        ...


class TransferEngine(RolloutEngine, Protocol):
    """Rollout engine that can receive weights from GPU to GPU."""

    @property
    def weight_client(self) -> Any:
        """Receiver of the weights, with the methods of vLLM's `VLLMWeightSyncClient`."""
        ...
