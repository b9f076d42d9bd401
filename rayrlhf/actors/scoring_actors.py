"""Actors of frozen models: a judge's verdicts, and log-probs of reference and teacher."""

from collections.abc import Sequence

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.worker import ModelCheck, Worker, check_assigned_gpu, returns_memory
from rayrlhf.config.judge import JudgeSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.records import Prompt, Records, Rollout, TokenScores, TokenSequence
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.scoring.judge_engine import JudgeEngine
from rayrlhf.models.network_io import OutputName
from rayrlhf.rewards.functions import JUDGE_PART, ScoringBatch
from rayrlhf.rewards.score import RewardBatch, sealed, weighted_sum


class JudgeActor(Worker):
    """One replica of the judge; ranks split the rollouts between them."""

    PRELOADED = RolloutActor.PRELOADED

    _engine: JudgeEngine
    _weight: float

    @measured
    def build(self, section: JudgeSection, seed: int, probe: bool) -> None:
        """Start the engine, and try it out on made-up responses."""
        check_assigned_gpu()
        self._weight = section.weight
        self._engine = JudgeEngine(section, seed)
        if probe:
            self._engine.try_out()

    @measured
    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> RewardBatch:
        """Judge rollouts, one prompt per rollout; without a score the part is NaN.

        Raises:
            UserError: see `JudgeEngine.parts`.
        """
        groups = [rollout.key.prompt for rollout in rollouts]
        parts = self._engine.parts(ScoringBatch.of_rollouts(prompts, rollouts), groups)
        weights = dict.fromkeys(parts, 0.0) | {JUDGE_PART: self._weight}
        return sealed(weighted_sum(parts, weights, complete=False), rollouts)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __ray_shutdown__(self) -> None:
        """Free the engine when Ray shuts the actor down."""
        if hasattr(self, "_engine"):
            self._engine.close()


class ReferenceActor(Worker):
    """One copy of the reference or the teacher; ranks split the sequences between them."""

    _engine: FrozenEngine

    @measured
    @returns_memory
    def build(
        self,
        model: ModelSection,
        batch_tokens: int,
        offload: bool,
        share_prefixes: SharePrefixes,
        vocabulary: int | None = None,
    ) -> None:
        """Load the model."""
        check_assigned_gpu()
        self._engine = FrozenEngine(model, batch_tokens, offload=offload, share_prefixes=share_prefixes, vocabulary=vocabulary)

    def load_check(self) -> ModelCheck:
        """See `Worker.load_check`."""
        return ModelCheck(self._engine.load_check, self._engine.shares_prefixes)

    @measured
    @returns_memory
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))
