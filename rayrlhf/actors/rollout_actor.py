"""Actor of one rollout replica: a rollout engine with queued requests and weight updates."""

from collections.abc import Sequence
from typing import Any, cast

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.replica_nodes import ReplicaNodes
from rayrlhf.actors.worker import Worker, check_assigned_gpu
from rayrlhf.data.records import Records, Rollout, RolloutRequest
from rayrlhf.engines.rollout.base import RolloutEngine, TransferEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.environments.players.factory import build_player
from rayrlhf.weight_sync.buckets import SharedTensor, from_shared


class RolloutActor(Worker):
    """One replica; calls run one at a time, so weights change between polls."""

    PRELOADED = ("transformers.models.auto.modeling_auto", "vllm.v1.engine.llm_engine")

    _engine: RolloutEngine
    _nodes: ReplicaNodes | None = None

    @measured
    def build(self, spec: RolloutSpec) -> None:
        """Start the engine with the weights of the model's files."""
        check_assigned_gpu()
        if spec.node.count > 1:
            self._nodes = ReplicaNodes(spec, self.rendezvous())
            spec = self._nodes.spec
        self._engine = build_player(spec)

    def submit(self, requests: Sequence[RolloutRequest], temperature: float, max_new_tokens: int) -> None:
        """Queue requests; `poll` decodes them."""
        self._engine.submit(requests, temperature=temperature, max_new_tokens=max_new_tokens)

    @measured
    def poll(self, minimum: int, seconds: float | None = None) -> tuple[list[Rollout], int]:
        """Decode queued requests; returns (finished rollouts, number of unfinished requests).

        Returns when `minimum` more requests are finished, none is left, or `seconds` have passed.
        """
        finished, unfinished = self._engine.poll(minimum, seconds), self._engine.unfinished
        self.actor_metrics.sampled(sum(len(rollout.response_ids) for rollout in finished), unfinished)
        return Records(finished), unfinished

    def cancel(self) -> int:
        """Drop all unfinished requests; returns the tokens that were sampled for them."""
        return self._engine.cancel()

    def sleep(self) -> None:
        """Free memory until the next weights arrive."""
        self._engine.sleep()

    def begin_weights(self, version: int) -> None:
        """Start receiving a weight version."""
        self._engine.begin_weights(version)

    @measured
    def receive_weights(self, bucket: Sequence[SharedTensor]) -> None:
        """Load one bucket, read in place from the object store."""
        self._engine.receive_weights(from_shared(bucket))

    def open_transfer(self, info: dict[str, Any]) -> None:
        """Connect to the policy for weights from GPU to GPU; waits for all members."""
        cast("TransferEngine", self._engine).weight_client.init_weight_transfer_engine(info)

    @measured
    def receive_transfer(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive weights that the policy sends from GPU to GPU."""
        cast("TransferEngine", self._engine).weight_client.update_weights(info)

    @measured
    def finish_weights(self) -> int:
        """Make the new weights current; returns their version."""
        self._engine.finish_weights()
        return self._engine.version

    def close(self) -> None:
        """Free the engine."""
        if self._nodes is not None:
            self._nodes.close()
        if hasattr(self, "_engine"):
            self._engine.close()

    def __ray_shutdown__(self) -> None:
        """Free the engine when Ray shuts the actor down."""
        self.close()
