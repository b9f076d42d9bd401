"""Texts and KL of single response tokens, by which the report colors recorded samples."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import Float32
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.scoring import ScoredRollouts


class SampleTokens:
    """Decodes single tokens with the policy's tokenizer, loaded on first use."""

    def __init__(self, model: ModelSection) -> None:
        self._model = model

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token; part of a character becomes the replacement character."""
        return [str(self._tokenizer.decode([int(token)])) for token in token_ids]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._model)


def token_kl(scored: ScoredRollouts, index: int) -> Float32 | None:
    """Return the policy's log-prob less the reference's at each response token of a rollout.

    Args:
        scored: a step's rollouts with the models' outputs.

    Returns:
        float32 [R] in nats, 0 on tokens that the policy did not sample (their sum is the estimate k1 of the response's KL;
        Schulman 2020, "Approximating KL Divergence"); None without a reference. Without a forward pass of the policy, the
        log-probs of the rollout engine are used.
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
