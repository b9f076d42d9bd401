"""Responses that the training data gives: their check, their tokens, and rollouts made of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Int32, Prompt, Rollout, RolloutRequest
from rayrlhf.engines.rollout.common import stop_token_ids
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.scoring import ScoredRollouts, Scorer


def check_given_responses(config: PPOConfig, prompts: Sequence[Prompt]) -> None:
    """Check that every training prompt has a response, where a section reads it.

    Raises:
        UserError: one has none; the message has the row and its columns.
    """
    divergence = config.teacher.divergence if config.teacher is not None else None
    fields = {
        "sft_warmup.response_field": config.sft_warmup.response_field if config.sft_warmup else None,
        "teacher.divergence.response_field": divergence.response_field if divergence else None,
    }
    for key, field in fields.items():
        if field is None:
            continue
        for prompt in prompts:
            if not isinstance(prompt.columns.get(field), str) or not prompt.columns[field]:
                columns = ", ".join(sorted(prompt.columns)) or "none"
                raise UserError(
                    f"{key} {field!r}: row {prompt.id + 1} of {config.data.train.path} has no text there; its columns are: "
                    f"{columns}"
                )


def response_encoder(config: PPOConfig, tokenizer: Tokenizer) -> Callable[[str], Int32]:
    """Return a function that encodes a response with its stop token, cut to `rollout.max_new_tokens`."""
    stops = stop_token_ids(config.model, tokenizer)
    # The tokenizer's own stop token, if generation stops at it.
    stop = int(tokenizer.eos_token_id) if tokenizer.eos_token_id in stops else stops[0]

    def encode(text: str) -> Int32:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, stop][: config.rollout.max_new_tokens], dtype=np.int32)

    return encode


def is_given_step(config: PPOConfig, step: int) -> bool:
    """Return True for a step that takes the dataset's responses.

    Steps count from 0; the share of the others is `teacher.divergence.student_share`.
    """
    divergence = config.teacher.divergence if config.teacher is not None else None
    if divergence is None:
        return False
    return float(np.random.default_rng((config.run.seed, step)).random()) >= divergence.student_share


def given_rollouts(
    config: PPOConfig,
    prompts: Sequence[Prompt],
    requests: Sequence[RolloutRequest],
    version: int,
    encode: Callable[[str], Int32],
) -> list[Rollout]:
    """Return the dataset's responses as rollouts whose log-probs are 0.

    Args:
        config: a run with `teacher.divergence.response_field`.
        prompts: one per request, in the same order.
        requests: their keys and seeds.
        version: weight version that all tokens get.
        encode: of `response_encoder`.
    """
    divergence = config.teacher.divergence if config.teacher is not None else None
    if divergence is None or divergence.response_field is None:
        raise ValueError("the configuration has no teacher.divergence.response_field")
    rollouts, stop = [], encode("")[-1]
    for prompt, request in zip(prompts, requests, strict=True):
        text = prompt.columns[divergence.response_field]
        ids = encode(text)
        rollouts.append(
            Rollout(
                key=request.key,
                prompt_ids=prompt.token_ids,
                response_ids=ids,
                action_mask=np.ones(len(ids), np.bool_),
                logprobs=np.zeros(len(ids), np.float32),
                versions=np.full(len(ids), version, np.int32),
                finish_reason="stop" if len(ids) < config.rollout.max_new_tokens or ids[-1] == stop else "length",
                text=text,
                seed=request.seed,
            )
        )
    return rollouts


class GivenResponses:
    """Scores responses of the dataset in place of sampled ones."""

    def __init__(self, config: PPOConfig) -> None:
        self._config = config

    def scored(
        self, scorer: Scorer, prompts: Sequence[Prompt], requests: Sequence[RolloutRequest], version: int
    ) -> ScoredRollouts:
        """Return scored responses, whose log-probs are the policy's: no rollout engine has sampled them."""
        scorer.add(given_rollouts(self._config, prompts, requests, version, self._encode))
        scored = scorer.finish()
        own = [scores.logprobs for scores in scored.forward_passes["policy"]]
        rows = zip(scored.rollouts, own, strict=True)
        return replace(scored, rollouts=tuple(replace(one, logprobs=row) for one, row in rows if row is not None))

    @cached_property
    def _encode(self) -> Callable[[str], Int32]:
        return response_encoder(self._config, load_tokenizer(self._config.model))
