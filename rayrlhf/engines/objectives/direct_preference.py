"""What DPO minimises: pairs classified by log-ratios to a reference whose log-probs were computed before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rayrlhf.algorithms.losses import DirectLoss, TokenLoss, direct_preference_loss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.data.supervised.supervised_samples import PreferencePair
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.objectives.preference import PAIR_MASK
from rayrlhf.engines.train.supervised_batches import supervised_batch
from rayrlhf.models.network import OutputName

REFERENCE = "reference_logprob"


@dataclass(frozen=True)
class DirectPreferenceObjective:
    """The loss of `rayrlhf.algorithms.losses`, averaged over the pairs of the optimizer step."""

    loss: DirectLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    temperature: float = 1.0

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Log-probs."""
        return frozenset({"logprobs"})

    @property
    def masks(self) -> Sequence[str]:
        """The answers' tokens, whose log-probs are needed, and one place a pair, which the loss is averaged over."""
        return ("action_mask", PAIR_MASK)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch of whole pairs (see `Objective.compute`); terms are [pairs, 1]."""
        mask = arrays["action_mask"]
        sums = zero_masked(outputs["logprobs"], mask).sum(1)
        pairs = direct_preference_loss(
            (sums - arrays[REFERENCE][:, 0]).view(-1, 2),
            mask.sum(1).view(-1, 2),
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        statistics = {name: values[:, None] for name, values in pairs.statistics.items()}
        return [LossComponent(PAIR_MASK, 1.0, TokenLoss(pairs.loss[:, None], statistics))]


def direct_preference_batch(pairs: Sequence[PreferencePair]) -> TrainingBatch:
    """Return pairs as a training batch: two rows each, kept together, the reference's log-probs in their first column.

    A pair without reference log-probs has 0 there, which is DPO without a reference.

    Raises:
        ValueError: an answer has nothing to learn, or begins at the first token.
    """
    batch = supervised_batch([answer for pair in pairs for answer in (pair.chosen, pair.rejected)])
    pair_mask = np.zeros((len(batch), batch.width), dtype=np.bool_)
    pair_mask[::2, 0] = True
    reference = np.zeros((len(batch), batch.width), dtype=np.float32)
    reference[:, 0] = [value for pair in pairs for value in pair.reference or (0.0, 0.0)]
    return TrainingBatch(batch.sequences, dict(batch.arrays) | {PAIR_MASK: pair_mask, REFERENCE: reference}, group_size=2)
