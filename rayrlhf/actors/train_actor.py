"""The actors of the models that learn: one process a rank, a DeepSpeed engine inside, a process group per role."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import ray
import torch.distributed

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.replica_client import DeviceSyncRequest, ReplicaClient
from rayrlhf.actors.worker import Worker
from rayrlhf.data.records import Records, TokenScores, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.train import training_state
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network import OutputName
from rayrlhf.storage.manifest import FileRecord
from rayrlhf.weight_sync.object_store import SharedTensor, to_shared

if TYPE_CHECKING:
    from rayrlhf.weight_sync.vllm_device import DeviceSender


class TrainActor(Worker):
    """One rank of a model that learns."""

    PRELOADED = ("deepspeed", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")

    _engine: TrainEngine
    _captured: StateFiles
    _sender: "DeviceSender | None" = None

    @measured
    def build(self, group: ProcessGroupSpec, spec: TrainEngineSpec) -> None:
        """Join the role's process group and load the model. Every rank must be called before any answers."""
        join(group)
        self._engine = TrainEngine(spec)

    @measured
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))

    @measured
    def update(self, batch: TrainingBatch, plan: UpdatePlan, objective: Objective) -> UpdateReport:
        """Run a PPO step's optimizer steps; every rank gets the same batch and plan and takes its own share."""
        return self._engine.update(batch, plan, objective)

    @ray.method(num_returns="streaming")
    def weights(self, bucket_bytes: int, dtype: Literal["float32", "bfloat16"]) -> Iterator[list[SharedTensor]]:
        """Stream the merged weights bucket by bucket. Return values belong to the driver: they outlive this actor."""
        for bucket in self._engine.weight_buckets(bucket_bytes, dtype=dtype):
            yield to_shared(bucket)

    @measured
    def join_weights(self, bucket_bytes: int, dtype: Literal["float32", "bfloat16"]) -> None:
        """Take part in gathering the weights on a rank whose own copy is not shipped."""
        for _ in self._engine.weight_buckets(bucket_bytes, dtype=dtype):
            pass

    @measured
    def send_weights(self, order: DeviceSyncRequest) -> None:
        """Bring the merged weights to replicas from GPU to GPU; every rank must be called, and rank 0 sends.

        Raises:
            ActorLostError: a replica is gone.
        """
        from rayrlhf.weight_sync.vllm_device import DeviceSender, EngineSource

        if self._sender is None:
            source = EngineSource(partial(self._engine.device_weights, order.dtype))
            self._sender = DeviceSender(order.transfer, torch.distributed.get_rank(), source)
        self._sender.send(ReplicaClient(order), order.members, order.workers * len(order.replicas), self.rendezvous)

    @measured
    def capture_state(self) -> None:
        """Copy this rank's part of the training state, for `write_state`; every rank must be called."""
        self._captured = self._engine.capture_state()

    @ray.method(concurrency_group="storage")
    def write_state(self, folder: Path) -> dict[str, FileRecord]:
        """Write the copied state, beside whatever else the actor does; returns what lies where in the folder."""
        captured, self._captured = self._captured, {}
        return training_state.write(captured, folder)

    @measured
    def snapshot(self) -> StateFiles:
        """Return this rank's part of the training state; the value belongs to the driver and outlives this actor."""
        return self._engine.capture_state()

    def load_snapshot(self, *parts: StateFiles) -> None:
        """Continue from the snapshots of all ranks, bit for bit."""
        self._engine.load_captured(parts)

    def checksum(self) -> int:
        """A 48-bit number that two models share only if all their merged weights are equal bit for bit; on every rank."""
        digest = hashlib.sha256()
        for bucket in self._engine.weight_buckets(dtype="float32"):
            for name, tensor in bucket:
                digest.update(name.encode())
                digest.update(tensor.detach().numpy().data.cast("B"))
        return int.from_bytes(digest.digest()[:6], "big")

    def load_state(self, folder: Path, resized: bool) -> None:
        """Continue from a saved training state: bit for bit, unless `resized`, where it is of another number of ranks."""
        self._engine.load_state(folder, resized=resized)

    @measured
    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder."""
        self._engine.export(folder)


class PolicyActor(TrainActor):
    """One rank of the policy, with the value head when the critic shares its trunk."""


class CriticActor(TrainActor):
    """One rank of a separate critic."""
