"""What samplers of several turns share: another sampler inside, which weights and sleep are passed on to."""

from typing import Any, cast

from rayrlhf.engines.rollout.base import RolloutEngine, TransferEngine
from rayrlhf.weight_sync.buckets import WeightBucket


class WrappedEngine:
    """A sampler around a sampler.

    Attributes:
        version: weight version that it samples with.

    Args:
        engine: samples single turns.
        continues: weights may change while samples are being played.
    """

    def __init__(self, engine: RolloutEngine, *, continues: bool) -> None:
        self.version = engine.version
        self._engine = engine
        self._continues = continues

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Let the engine sleep until new weights come."""
        self._engine.sleep()

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Raises:
            RuntimeError: requests are unfinished, whose tokens would come from two versions, and are not to continue.
        """
        if self.unfinished and not self._continues:
            raise RuntimeError(f"weights cannot change while {self.unfinished} requests are unfinished")
        self._engine.begin_weights(version)

    def receive_weights(self, bucket: WeightBucket) -> None:
        """Take one bucket in."""
        self._engine.receive_weights(bucket)

    def finish_weights(self) -> None:
        """Make the new version current."""
        self._engine.finish_weights()
        self.version = self._engine.version

    @property
    def weight_client(self) -> Any:
        """The inner sampler's own, where weights come from GPU to GPU."""
        return cast("TransferEngine", self._engine).weight_client
