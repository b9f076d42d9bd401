"""The tokens of the responses that are written down, and what each adds to the KL: the report colours them by it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import Float32
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.scoring import ScoredRollouts


class SampleTokens:
    """Decodes single tokens with the policy's tokenizer, which is loaded when the first is wanted."""

    def __init__(self, model: ModelSection) -> None:
        self._model = model

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token's own text; part of a character shows as the replacement character."""
        return [str(self._tokenizer.decode([int(token)])) for token in token_ids]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._model)


def token_kl(scored: ScoredRollouts, index: int) -> Float32 | None:
    """Return the policy's log-prob less the reference's at each response token of a rollout.

    Args:
        scored: a step's rollouts with the models' readings.
        index: place of the rollout.

    Returns:
        float32 [R] in nats, 0 on tokens that the policy did not sample (their sum is the estimate k1 of the response's KL;
        Schulman 2020, "Approximating KL Divergence"); None where no reference read the step. Where the policy did not read it
        again, its own log-probs from sampling stand in.
    """
    rows = scored.forward_passes.get("reference")
    reference = rows[index].logprobs if rows is not None else None
    if reference is None:
        return None
    rollout = scored.rollouts[index]
    policy = scored.forward_passes.get("policy")
    read = policy[index].logprobs if policy is not None else None
    difference = (rollout.logprobs if read is None else read) - reference
    return np.where(rollout.action_mask, difference, np.float32(0)).astype(np.float32)
