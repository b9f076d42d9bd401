"""Test call of a run's reward functions on two made-up responses, before anything starts."""

import time
from collections.abc import Sequence

import numpy as np

from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, required_columns
from rayrlhf.rewards.score import run_functions

RESPONSES = ("The answer is 42.", "Yes.")
SLOW_SECONDS = 1.0
_NOT_CALLED = ("environment", "judge", "remote")
"""Built-in functions that need an episode or a server."""


def probe_functions(functions: Sequence[BoundFunction], prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[str]:
    """Call each function once; returns a line for each slow one.

    Args:
        functions: of the run.
        prompts: of the run. The responses are to the first one, and to the first with null in a column that a function needs.
        tokenizer: of the policy.

    Raises:
        UserError: a function needs a column that the dataset lacks, raises, or returns something else than numbers or None.
    """
    lines = []
    for function in functions:
        batch = _batch(function, prompts, tokenizer)
        if function.function.__module__.startswith("rayrlhf.") and function.name in _NOT_CALLED:
            continue
        began = time.monotonic()
        try:
            run_functions([function], batch)
        except UserError as error:
            rows = " and ".join(dict.fromkeys(str(rollout.key.prompt) for rollout in batch.rollouts or ()))
            raise UserError(f"{error}; it was called on two made-up responses, to prompt {rows} (reward.probe)") from error
        seconds = time.monotonic() - began
        if seconds > SLOW_SECONDS:
            lines.append(f"reward function {function.name!r} took {seconds:.1f} s for two made-up responses")
    return lines


def _batch(function: BoundFunction, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> ScoringBatch:
    needed = required_columns([function])
    incomplete = (prompt for prompt in prompts if any(prompt.columns.get(name) is None for name in needed))
    chosen = [prompts[0], next(incomplete, prompts[min(1, len(prompts) - 1)])]
    return ScoringBatch.of_rollouts(chosen, [_rollout(*pair, tokenizer) for pair in zip(chosen, RESPONSES, strict=True)])


def _rollout(prompt: Prompt, text: str, tokenizer: Tokenizer) -> Rollout:
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    count = len(ids)
    return Rollout(
        key=SampleKey(0, prompt.id, 0),
        prompt_ids=prompt.token_ids,
        response_ids=ids,
        action_mask=np.ones(count, dtype=np.bool_),
        logprobs=np.zeros(count, dtype=np.float32),
        versions=np.zeros(count, dtype=np.int32),
        finish_reason="stop",
        text=text,
        seed=0,
    )
