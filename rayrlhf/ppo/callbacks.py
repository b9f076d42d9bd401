"""Callbacks of the training loop.

A callback receives plain values and may raise to end the run.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rayrlhf.config.runtime import CallbackSection
from rayrlhf.plugins import Registry, bind_arguments

if TYPE_CHECKING:
    from rayrlhf.ppo.evaluation import Evaluation
    from rayrlhf.ppo.scoring import ScoredRollouts
    from rayrlhf.ppo.trainer import PPOTrainer


class Callback:
    """Base class of callbacks; every method does nothing by default."""

    def on_start(self, trainer: "PPOTrainer") -> None:
        """Run when the actors are up and the run has resumed, before the first step."""

    def on_step_end(self, step: int, metrics: Mapping[str, float], scored: "ScoredRollouts") -> None:
        """Run after a step: its update is done and every replica serves the new weights."""

    def on_evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """Run after an evaluation of the policy after `step` steps."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Run when the checkpoint in `folder` is complete."""

    def on_end(self, trainer: "PPOTrainer") -> None:
        """Run when the loop has ended without an error; the actors are still up."""


CALLBACKS: Registry[type[Callback]] = Registry(
    "callback", {}, "subclass of rayrlhf.Callback", lambda found: inspect.isclass(found) and issubclass(found, Callback)
)


def resolve_callbacks(sections: Iterable[CallbackSection]) -> list[Callable[[], Callback]]:
    """Return the classes of `observe.callbacks` with their arguments bound.

    Raises:
        UserError: a name cannot be resolved to a subclass of `Callback`, or the arguments do not fit it.
    """
    return [
        bind_arguments(f"callback {section.name!r}", CALLBACKS.resolve(section.name), section.arguments) for section in sections
    ]
