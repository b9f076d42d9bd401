"""Base class of players: a rollout engine around a single-turn engine that gets the weights."""

from abc import ABC, abstractmethod
from typing import Any, cast

from rayrlhf.engines.rollout.base import RolloutEngine, TransferEngine
from rayrlhf.weight_sync.buckets import WeightBucket


class Player(ABC):
    """A rollout engine that samples through another one.

    Attributes:
        version: weight version in use.

    Args:
        continues: weights may change while samples are unfinished.
    """

    def __init__(self, engine: RolloutEngine, *, continues: bool) -> None:
        self.version = engine.version
        self._engine = engine
        self._continues = continues

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""

    def sleep(self) -> None:
        """Put the engine to sleep until new weights arrive."""
        self._engine.sleep()

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Raises:
            RuntimeError: requests are unfinished and must not continue with another version.
        """
        if self.unfinished and not self._continues:
            raise RuntimeError(f"weights cannot change while {self.unfinished} requests are unfinished")
        self._engine.begin_weights(version)

    def receive_weights(self, bucket: WeightBucket) -> None:
        """Load one bucket."""
        self._engine.receive_weights(bucket)

    def finish_weights(self) -> None:
        """Make the new version current."""
        self._engine.finish_weights()
        self.version = self._engine.version

    @property
    def weight_client(self) -> Any:
        """Client of the inner engine for weights sent from GPU to GPU."""
        return cast("TransferEngine", self._engine).weight_client
