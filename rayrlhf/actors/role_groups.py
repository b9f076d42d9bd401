"""Typed groups of actors, one class per role; every method calls the actors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rayrlhf.actors.actor_group import ActorGroup
from rayrlhf.actors.placement import Role
from rayrlhf.actors.remote import PendingCalls, Ref, as_argument, remote_stream
from rayrlhf.actors.replica_client import DeviceSyncRequest
from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.actors.role_specs import JudgeSpec, ReferenceSpec
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.scoring_actors import JudgeActor, ReferenceActor
from rayrlhf.actors.train_actor import TrainActor
from rayrlhf.actors.waiting import wait_all
from rayrlhf.actors.worker import Worker
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.records import Prompt, Rollout, TokenScores, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.engines.train.process_group import ProcessGroupSpec
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network_io import OutputName
from rayrlhf.rewards.score import RewardBatch
from rayrlhf.storage.manifest import FileRecord
from rayrlhf.weight_sync.buckets import SharedTensor, SyncDtype


class TrainGroup(ActorGroup[TrainActor]):
    """Ranks of a model in training, which form one process group."""

    __slots__ = ()

    def build(self, spec: TrainEngineSpec, backend: Literal["gloo", "nccl"], seconds: float) -> PendingCalls[None]:
        """Form the process group and load the model.

        Args:
            spec: of the train engine.
            backend: of the collectives.
            seconds: deadline for rank 0's address, the only result waited for.
        """
        address, port = wait_all({self.names[0]: self.call_rank(0, Worker.rendezvous)}, "rendezvous", seconds)[0]
        members = [ProcessGroupSpec(rank, len(self), address, port, backend) for rank in range(len(self))]
        return {self.names[rank]: self.call_rank(rank, TrainActor.build, member, spec) for rank, member in enumerate(members)}

    def score(
        self, rank: int, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> Ref[list[TokenScores]]:
        """Score sequences on one rank."""
        return self.call_rank(rank, TrainActor.score, sequences, outputs, temperature, reference)

    def update(self, batch: Ref[TrainingBatch], plan: UpdatePlan, objective: Objective) -> PendingCalls[UpdateReport]:
        """Run a step's optimizer steps; every rank trains on its share of the batch."""
        return self.call(TrainActor.update, as_argument(batch), plan, objective)

    def capture_state(self) -> PendingCalls[None]:
        """Copy the training state in memory, for `write_state`."""
        return self.call(TrainActor.capture_state)

    def write_state(self, folder: Path) -> PendingCalls[dict[str, FileRecord]]:
        """Write the copied state to a folder while the actors do other work."""
        return self.call(TrainActor.write_state, folder)

    def load_state(self, folder: Path, resized: bool) -> PendingCalls[None]:
        """Continue from a saved training state; `resized` if it is of another number of ranks."""
        return self.call(TrainActor.load_state, folder, resized)

    def snapshot(self) -> PendingCalls[StateFiles]:
        """Copy the training state to the object store."""
        return self.call(TrainActor.snapshot)

    def load_snapshot(self, *parts: Ref[StateFiles]) -> PendingCalls[None]:
        """Continue from the snapshots of all ranks."""
        return self.call(TrainActor.load_snapshot, *map(as_argument, parts))

    def checksums(self) -> PendingCalls[dict[str, int]]:
        """Return a checksum of each parameter."""
        return self.call(TrainActor.checksums)


class PolicyGroup(TrainGroup):
    """Ranks of the policy."""

    __slots__ = ()

    def weights(self, bucket_bytes: int, dtype: SyncDtype, adapters: bool = False) -> Iterator[Ref[list[SharedTensor]]]:
        """Stream the weights from rank 0, merged or the adapters alone.

        The other ranks must `join_weights`.
        """
        return remote_stream(self.handles[0], TrainActor.weights, bucket_bytes, dtype, adapters)

    def join_weights(self, dtype: SyncDtype, adapters: bool = False) -> PendingCalls[None]:
        """Let all ranks but rank 0 take part in gathering the weights."""
        ranks = range(1, len(self))
        return {self.names[rank]: self.call_rank(rank, TrainActor.join_weights, dtype, adapters) for rank in ranks}

    def sync_dtype(self) -> PendingCalls[SyncDtype]:
        """Return the data type in which the weights travel."""
        return {self.names[0]: self.call_rank(0, TrainActor.sync_dtype)}

    def update_arrived(self) -> PendingCalls[float | None]:
        """Return the share of the update that the last merged sync brought."""
        return {self.names[0]: self.call_rank(0, TrainActor.update_arrived)}

    def send_weights(self, request: DeviceSyncRequest) -> PendingCalls[None]:
        """Send the merged weights to replicas from GPU to GPU."""
        return self.call(TrainActor.send_weights, request)

    def export(self, folder: Path) -> PendingCalls[None]:
        """Write the model as a Hugging Face folder."""
        return self.call(TrainActor.export, folder)


class CriticGroup(TrainGroup):
    """Ranks of a separate critic."""

    __slots__ = ()


class ReferenceGroup(ActorGroup[ReferenceActor]):
    """Copies of the reference model or of the teacher."""

    __slots__ = ()

    def build(self, rank: int, spec: ReferenceSpec) -> Ref[None]:
        """Load the model on one rank."""
        return self.call_rank(rank, ReferenceActor.build, *spec)

    def score(
        self, rank: int, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> Ref[list[TokenScores]]:
        """Score sequences on one rank."""
        return self.call_rank(rank, ReferenceActor.score, sequences, outputs, temperature, reference)


class RewardGroup(ActorGroup[RewardActor]):
    """Copies of the reward functions and reward models."""

    __slots__ = ()

    def build(self, rank: int, section: RewardSection, share_prefixes: SharePrefixes, policy: ModelSection) -> Ref[None]:
        """Load the functions and models on one rank."""
        return self.call_rank(rank, RewardActor.build, section, share_prefixes, policy)

    def score(self, rank: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Ref[RewardBatch]:
        """Score rollouts on one rank, one prompt per rollout."""
        return self.call_rank(rank, RewardActor.score, prompts, rollouts)


class JudgeGroup(ActorGroup[JudgeActor]):
    """Replicas of the judge."""

    __slots__ = ()

    def build(self, rank: int, spec: JudgeSpec) -> Ref[None]:
        """Start the engine of one replica."""
        return self.call_rank(rank, JudgeActor.build, *spec)

    def score(self, rank: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Ref[RewardBatch]:
        """Judge rollouts on one rank, one prompt per rollout."""
        return self.call_rank(rank, JudgeActor.score, prompts, rollouts)

    def close(self) -> PendingCalls[None]:
        """Free the engines."""
        return self.call(JudgeActor.close)


class RolloutGroup(ActorGroup[RolloutActor]):
    """Rollout replicas; `ReplicaPool` calls them one by one as `RolloutReplica`."""

    __slots__ = ()

    def build(self, rank: int, spec: RolloutSpec) -> Ref[None]:
        """Start the engine of one replica."""
        return self.call_rank(rank, RolloutActor.build, spec)

    def close(self) -> PendingCalls[None]:
        """Free the engines."""
        return self.call(RolloutActor.close)


GROUP_CLASSES: Mapping[Role, type[ActorGroup[Worker]]] = {
    "policy": PolicyGroup,
    "critic": CriticGroup,
    "reference": ReferenceGroup,
    "teacher": ReferenceGroup,
    "reward": RewardGroup,
    "judge": JudgeGroup,
    "rollout": RolloutGroup,
}
