"""Rollout spec and helpers shared by all rollout engines: stop tokens, length limits, rollout records."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rayrlhf.config.library_types import PretrainedConfig, Tokenizer
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest
from rayrlhf.errors import UserError
from rayrlhf.models.load import resolve_path

START_VERSION = -1
"""Weight version of an engine that still samples with the weights it was started from."""

VLLM_ENVIRONMENT = {
    # The engine core stays in its actor's process: weights by reference, no children to lose, 4 s to start instead of 17.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What a process that runs vLLM is started with; the engine sets what is missing."""


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """What one replica is built from. `seed` seeds the backend itself; every request brings its own.

    `environment` answers the policy's turns, if there is one, and `lockstep` lets all samples play turn by turn. Without
    `logprobs` those of the rollouts may be NaN, where texts are all that is wanted: small models are sampled faster then.
    `continues` lets weights change while requests are unfinished.
    """

    model: ModelSection
    rollout: RolloutSection
    seed: int
    environment: EnvironmentSection | None = None
    lockstep: bool = False
    logprobs: bool = True
    continues: bool = False


def rollout_environment(rollout: RolloutSection, *, threads: int) -> dict[str, str]:
    """Return the environment variables a replica's process must be started with.

    Args:
        rollout: the section that names the backend.
        threads: compute threads of the process. They have to be set from outside: OpenMP reads them when torch is imported.
    """
    return {"OMP_NUM_THREADS": str(threads)} | (VLLM_ENVIRONMENT if rollout.backend == "vllm" else {})


def stop_token_ids(model: ModelSection, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a response: those of the model's generation config and the tokenizer's own, sorted.

    Chat models end a turn with a token that is often not the tokenizer's end of sequence; generation configs list both.
    """
    from transformers import AutoConfig, GenerationConfig

    path = resolve_path(model)
    try:
        source = GenerationConfig.from_pretrained(path, revision=model.revision)
    except OSError:  # A model need not come with one.
        source = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    several = source.eos_token_id if isinstance(source.eos_token_id, list) else [source.eos_token_id]
    return sorted({int(token) for token in (*several, tokenizer.eos_token_id) if token is not None})


def check_new(requests: Iterable[RolloutRequest], queued: Iterable[RolloutRequest]) -> None:
    """Check that no request is there twice: its rollout could not be told from the other's.

    Raises:
        ValueError: one of `requests` has the key of another, or of a queued one.
    """
    keys = {request.key for request in queued}
    for request in requests:
        if request.key in keys:
            raise ValueError(f"request {request.key} is already queued")
        keys.add(request.key)


def new_token_limits(requests: Iterable[RolloutRequest], max_new_tokens: int, max_model_length: int) -> list[int]:
    """Return how many tokens each request may sample: at most `max_new_tokens`, and no more than the context still holds.

    Raises:
        UserError: a prompt leaves no room for a single token.
    """
    limits = []
    for request in requests:
        prompt_length = len(request.prompt_ids)
        if prompt_length >= max_model_length:
            raise UserError(
                f"prompt {request.key.prompt}: {prompt_length} tokens leave no room for a response, expected fewer than"
                f" {max_model_length} (rollout.max_model_length, or the model's own context); shorten or drop long prompts"
            )
        limits.append(min(max_new_tokens, max_model_length - prompt_length))
    return limits


def context_length(rollout: RolloutSection, model_config: PretrainedConfig) -> int:
    """Return the longest prompt + response in tokens: what the section asks for, else what the model was made for.

    Raises:
        UserError: the section asks for more than the model's positions, or neither says anything.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    if rollout.max_model_length is None:
        if positions is None:
            raise UserError("rollout.max_model_length: this model's config names no context length; set it")
        return int(positions)
    if positions is not None and rollout.max_model_length > positions:
        raise UserError(f"rollout.max_model_length: {rollout.max_model_length} is beyond the model's {positions} positions")
    return rollout.max_model_length


def make_rollout(
    request: RolloutRequest,
    response_ids: Sequence[int],
    logprobs: Sequence[float],
    versions: ArrayLike,
    finish_reason: Literal["stop", "length"],
    tokenizer: Tokenizer,
) -> Rollout:
    """Put a finished request into its record. The text is what the tokens say, without clean-up, special tokens left out."""
    text = tokenizer.decode(response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Rollout(
        key=request.key,
        prompt_ids=request.prompt_ids,
        response_ids=np.asarray(response_ids, dtype=np.int32),
        action_mask=np.ones(len(response_ids), dtype=np.bool_),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        versions=np.asarray(versions, dtype=np.int32),
        finish_reason=finish_reason,
        text=text,
        seed=request.seed,
    )
