"""Actor of the frozen reference model: forward passes only."""

from collections.abc import Sequence

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.worker import Worker
from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import Records, TokenScores, TokenSequence
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.models.network import OutputName


class ReferenceActor(Worker):
    """One copy of the reference; ranks split the sequences between them."""

    _engine: FrozenEngine

    @measured
    def build(self, model: ModelSection, batch_tokens: int, offload: bool) -> None:
        """Load the model."""
        self._engine = FrozenEngine(model, batch_tokens, offload=offload)

    @measured
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))
