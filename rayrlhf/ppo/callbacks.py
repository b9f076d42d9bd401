"""What a user can hook into the loop. A callback sees plain values and may raise to end the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayrlhf.ppo.evaluation import Evaluation
    from rayrlhf.ppo.scoring import ScoredRollouts
    from rayrlhf.ppo.trainer import PPOTrainer


class Callback:
    """Override what is of interest; every method does nothing by itself."""

    def on_start(self, trainer: "PPOTrainer") -> None:
        """Actors are up, nothing is sampled yet."""

    def on_step_end(self, step: int, metrics: Mapping[str, float], scored: "ScoredRollouts") -> None:
        """A step is complete: its update is done and every replica serves the new weights."""

    def on_evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """The held-out prompts were answered with the policy after `step` steps."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A complete checkpoint lies in `folder`."""

    def on_end(self, trainer: "PPOTrainer") -> None:
        """The last step is done and the actors are still up."""
