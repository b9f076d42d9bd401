"""Rollout spec and helpers of all rollout engines: stop tokens, length limits, records."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ValidationError

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, Tokenizer
from rayrlhf.models.load_check import rope_limit
from rayrlhf.models.model_files import special_tokens
from rayrlhf.models.model_path import resolve_path

_NO_UPDATES = ("gpt_oss",)
"""Families whose expert and attention weights vLLM 0.32 loads at its start only."""
START_VERSION = -1
"""Weight version of an engine that still has its initial weights."""

VLLM_ENVIRONMENT = {
    # The engine core runs in its actor's process: weights by reference, no child processes, 4 s to start instead of 17.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Worker processes, one per device: a forked one deadlocks where this process has run OpenMP threads, and vLLM's binding of
    # threads needs a NUMA node for each worker on a CPU.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables of a process that runs vLLM; the engine sets missing ones."""


@dataclass(frozen=True, slots=True)
class ReplicaNode:
    """One of the nodes of a replica, and the address at which its workers meet."""

    rank: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Picklable settings of one replica.

    Attributes:
        model: model to generate with.
        rollout: backend and sampling settings.
        seed: seed of the backend itself; every request has its own.
        environment: environment that responds to the policy's turns, or None.
        lockstep: all samples advance turn by turn together.
        logprobs: compute log-probs. Without them those of the rollouts may be NaN; small models then generate faster.
        continues: weights may change while requests are unfinished.
        adapters: serve the model's adapters unmerged; weight updates then hold the adapters' tensors only.
        eager: never compile the model, so that hooks on its layers run on GPUs too.
        section: of the configuration, for error messages.
        reference: frozen model for requests with a `reference_share`; only for the backend `transformers`.
        node: of this process; with several nodes each has as many workers.
    """

    model: ModelSection
    rollout: RolloutSection
    seed: int
    environment: EnvironmentSection | None = None
    lockstep: bool = False
    logprobs: bool = True
    continues: bool = False
    adapters: bool = False
    eager: bool = False
    section: str = "rollout"
    reference: ModelSection | None = None
    node: ReplicaNode = ReplicaNode()


def rollout_environment(rollout: RolloutSection, *, threads: int) -> dict[str, str]:
    """Return the environment variables to start a replica's process with.

    Args:
        rollout: section that names the backend.
        threads: compute threads of the replica over all nodes, divided among its workers. They must be set from outside:
            OpenMP reads them when torch is imported.
    """
    own = {"OMP_NUM_THREADS": str(max(1, threads // rollout.devices))}
    return own | (VLLM_ENVIRONMENT if rollout.backend == "vllm" else {})


def stop_token_ids(model: ModelSection, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a response, sorted.

    They are the union of the model's generation config and the tokenizer's own. Chat models often end a turn with a token that
    is not the tokenizer's end of sequence; generation configs list both.

    Raises:
        UserError: the model's are no token ids.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    path, quiet = resolve_path(model), ("missing_entries", "gated_repo", "connection_errors")
    named = {f"_raise_exceptions_for_{case}": False for case in quiet}
    file = cached_file(path, "generation_config.json", revision=model.revision, **named)
    if file is None:  # it is optional
        config = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        name, values = "config.json", config.get_text_config().to_dict()
    else:  # as stored, because other settings may be invalid
        name, values = "generation_config.json", json.loads(Path(file).read_text(encoding="utf-8"))
    found = special_tokens(values, "eos_token_id", f"model.path {model.path!r}: {name}")
    return sorted({*found, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])})


def engine_reason(error: Exception) -> str:
    """Return the line of an engine's error that holds its reason.

    Of a failed validation it is the first field with its fault; a child process ends with a line that points above.
    """
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = first["msg"].splitlines()[0].partition(" Supported architectures")[0]  # hundreds of names
        return ": ".join([".".join(map(str, (error.title, *first["loc"]))), message])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error: " in line:
            return line.split("Error: ", 1)[1]
    return lines[0] if lines else repr(error)


def check_new(requests: Iterable[RolloutRequest], queued: Iterable[RolloutRequest]) -> None:
    """Check that all request keys are distinct, so that rollouts can be told apart.

    Raises:
        ValueError: one of `requests` has the key of another, or of a queued one.
    """
    keys = {request.key for request in queued}
    for request in requests:
        if request.key in keys:
            raise ValueError(f"request {request.key} is already queued")
        keys.add(request.key)


def new_token_limits(
    requests: Iterable[RolloutRequest], max_new_tokens: int, max_model_length: int, vocabulary: int
) -> list[int]:
    """Return the maximum number of new tokens of each request.

    It is `max_new_tokens`, or less if the context has less room.

    Raises:
        UserError: a prompt leaves no room for a single token, or has a token beyond the model's vocabulary.
    """
    limits = []
    for request in requests:
        prompt_length = len(request.prompt_ids)
        largest = int(request.prompt_ids.max(initial=0))
        if largest >= vocabulary:
            raise UserError(
                f"prompt {request.key.prompt}: token {largest} of its tokenizer, expected at most {vocabulary - 1}, the last"
                " of the model"
            )
        if prompt_length >= max_model_length:
            raise UserError(
                f"prompt {request.key.prompt}: {prompt_length} tokens leave no room for a response, expected fewer than"
                f" {max_model_length} (rollout.max_model_length, or the model's own context); shorten or drop long prompts"
            )
        limits.append(min(max_new_tokens, max_model_length - prompt_length))
    return limits


def context_length(rollout: RolloutSection, model_config: PretrainedConfig, section: str = "rollout") -> int:
    """Return the maximum of prompt + response in tokens: the section's, or the model's own.

    Args:
        section: of the setting in the configuration, for messages.

    Raises:
        UserError: the section sets more than the model's positions, or neither has a limit.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    if rollout.max_model_length is None:
        if positions is None:
            raise UserError(f"{section}.max_model_length: this model's config names no context length; set it")
        return int(positions)
    if positions is not None and rollout.max_model_length > positions:
        raise UserError(f"{section}.max_model_length: {rollout.max_model_length} is beyond the model's {positions} positions")
    return rollout.max_model_length


def trained_context(rollout: RolloutSection, model_config: PretrainedConfig) -> int:
    """Return the context of a model that is trained on its samples (`context_length`).

    Raises:
        UserError: the backend would sample from another distribution than that of the trained model.
    """
    context, limit, family = context_length(rollout, model_config), rope_limit(model_config), model_config.model_type
    if rollout.backend != "vllm":
        return context
    if family in _NO_UPDATES:
        raise UserError(f"rollout.backend vllm: it does not take new weights of a {family} model; expected transformers")
    if limit is not None and context > limit:
        raise UserError(
            f"rollout.max_model_length {context}: beyond {limit} tokens vLLM gives LongRoPE's long frequencies to short ones "
            f"too, the trained model does not; expected at most {limit}"
        )
    window = getattr(model_config, "sliding_window", None) if family == "cohere2" else None
    if window is not None and context > window:
        raise UserError(
            f"rollout.max_model_length {context}: vLLM's sliding window of a cohere2 model has a token more than the trained "
            f"model's {window}; expected at most {window}"
        )
    return context


def check_room(context: int, prompt: int | None, response: int) -> None:
    """Check that prompt and response fit into the context.

    Args:
        context: tokens of prompt and response together.
        prompt: `data.max_prompt_tokens`.
        response: `rollout.max_new_tokens`.

    Raises:
        UserError: they do not fit, or no token is left for a prompt.
    """
    if (prompt or 1) + response > context:
        wanted = f"rollout.max_new_tokens {response}" + ("" if prompt is None else f" and data.max_prompt_tokens {prompt}")
        left = context - (prompt or 1)
        raise UserError(
            f"{wanted}: more than the {context} tokens of the model's context for prompt and response"
            + (f"; expected rollout.max_new_tokens <= {left}" if left > 0 else "")
        )


def make_rollout(
    request: RolloutRequest,
    response_ids: Sequence[int],
    logprobs: Sequence[float],
    versions: ArrayLike,
    finish_reason: Literal["stop", "length"],
    tokenizer: Tokenizer,
) -> Rollout:
    """Build the record of a finished request.

    The text is decoded without clean-up and without special tokens.
    """
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
