"""Actors of the models in training: one process per rank, a process group per role."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.remote import concurrency_group, streaming
from rayrlhf.actors.worker import ModelCheck, Worker, check_assigned_gpu, returns_memory
from rayrlhf.data.records import Records, TokenScores, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.train import training_state
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network_io import OutputName
from rayrlhf.storage.manifest import FileRecord
from rayrlhf.weight_sync.buckets import SharedTensor, SyncDtype, to_shared

if TYPE_CHECKING:
    from rayrlhf.actors.replica_client import DeviceSyncRequest
    from rayrlhf.weight_sync.vllm_sender import DeviceSender


class TrainActor(Worker):
    """One rank of a model in training."""

    PRELOADED = ("deepspeed", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")

    _engine: TrainEngine
    _captured: StateFiles
    _sender: "DeviceSender | None" = None

    @measured
    @returns_memory
    def build(self, group: ProcessGroupSpec, spec: TrainEngineSpec) -> None:
        """Join the role's process group and load the model; a collective call of all ranks."""
        check_assigned_gpu()
        join(group)
        self._engine = TrainEngine(spec)

    def load_check(self) -> ModelCheck:
        """See `Worker.load_check`."""
        return ModelCheck(self._engine.load_check, self._engine.shares_prefixes)

    def sync_dtype(self) -> SyncDtype:
        """Return the data type in which weights travel: the one this device computes in."""
        return self._engine.sync_dtype

    @measured
    @returns_memory
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))

    @measured
    @returns_memory
    def update(self, batch: TrainingBatch, plan: UpdatePlan, objective: Objective) -> UpdateReport:
        """Run a step's optimizer steps on this rank's share of the batch."""
        return self._engine.update(batch, plan, objective)

    @streaming
    def weights(self, bucket_bytes: int, dtype: SyncDtype, adapters: bool = False) -> Iterator[list[SharedTensor]]:
        """Stream the weights in buckets, merged or the adapters alone.

        The driver owns the buckets, so they outlive this actor.
        """
        try:
            for bucket in self._engine.weight_buckets(bucket_bytes, dtype=dtype, adapters=adapters):
                yield to_shared(bucket)
        finally:
            self.return_memory()

    @measured
    @returns_memory
    def join_weights(self, dtype: SyncDtype, adapters: bool = False) -> None:
        """Take part in gathering the weights on a rank that sends none."""
        self._engine.join_weights(dtype, adapters=adapters)

    def update_arrived(self) -> float | None:
        """Return the share of the update that the last merged sync brought."""
        return self._engine.update_arrived

    @measured
    @returns_memory
    def send_weights(self, request: "DeviceSyncRequest") -> None:
        """Send the merged weights from rank 0 to replicas on GPUs; a collective call.

        Raises:
            ActorLostError: a replica is gone.
        """
        from rayrlhf.actors.replica_client import ReplicaClient
        from rayrlhf.weight_sync.vllm_sender import DeviceSender, EngineSource

        if self._sender is None:
            source = EngineSource(partial(self._engine.device_weights, request.dtype))
            self._sender = DeviceSender(request.transfer, torch.distributed.get_rank(), source)
        workers = request.workers * len(request.replicas)
        self._sender.send(ReplicaClient(request), request.members, workers, self.rendezvous)

    @measured
    @returns_memory
    def capture_state(self) -> None:
        """Copy this rank's part of the training state, for `write_state`; a collective call."""
        self._captured = self._engine.capture_state()

    @concurrency_group("storage")
    def write_state(self, folder: Path) -> dict[str, FileRecord]:
        """Write the copied state while the actor does other work; returns the files by name."""
        captured, self._captured = self._captured, {}
        return training_state.write(captured, folder)

    @measured
    @returns_memory
    def snapshot(self) -> StateFiles:
        """Return this rank's part of the training state; the value outlives this actor."""
        return self._engine.capture_state()

    @returns_memory
    def load_snapshot(self, *parts: StateFiles) -> None:
        """Continue from the snapshots of all ranks, bit for bit."""
        self._engine.load_captured(parts)

    @returns_memory
    def checksums(self) -> dict[str, int]:
        """Return a checksum of each parameter, for comparison bit for bit; a collective call."""
        return self._engine.checksums()

    @returns_memory
    def load_state(self, folder: Path, resized: bool) -> None:
        """Continue from a saved training state.

        Bit for bit, unless `resized`: then it was saved by another number of ranks.
        """
        self._engine.load_state(folder, resized=resized)

    @measured
    @returns_memory
    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder."""
        self._engine.export(folder)


class PolicyActor(TrainActor):
    """One rank of the policy, with the value head when the critic shares its trunk."""


class CriticActor(TrainActor):
    """One rank of a separate critic."""
