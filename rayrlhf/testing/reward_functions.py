"""Contract test of reward functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.data.records import Float32, Rollout, SampleKey
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.registry import RewardFunction, resolve
from rayrlhf.rewards.returned_values import Per
from rayrlhf.rewards.score import run_functions
from rayrlhf.testing.expect import expect

RESPONSES = ("", "Answer: 7", "The answer is 1,234.", "A longer response\nof two lines with ünïcode.")


def check_reward_function(
    function: RewardFunction | str,
    responses: Sequence[str] = RESPONSES,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    per: Per = "response",
    independent: bool = True,
    **arguments: Any,
) -> Float32:
    """Check a reward function on a small batch.

    It must return a finite number or None per response (a list of them with `per`), apply to at least one response, and return
    the same value for a response alone as within the batch.

    Args:
        function: the function or its name in a config.
        responses: [B], responses to score. Their token ids are one byte each.
        columns: dataset columns, each [B].
        per: `per` of the config.
        independent: False skips the comparison with batches of one, for functions that compare samples or are random.
        arguments: `arguments` of the config.

    Returns:
        The values, float32 [B], NaN for None.

    Raises:
        AssertionError: the function breaks its contract.
    """
    resolved = resolve(function) if isinstance(function, str) else function
    bound = BoundFunction("checked", resolved, arguments=arguments, per=per)
    batch = _batch(responses, columns or {}, range(len(responses)))
    values = _values(bound, batch)
    expect(not np.isnan(values).all(), "the reward function applies to no response: all values are None")
    for row in range(len(responses)) if independent else ():
        alone = _values(bound, _batch(responses, columns or {}, [row]))[0]
        same = np.isclose(alone, values[row], rtol=1e-5, atol=1e-6, equal_nan=True)
        expect(same, f"response {row} has value {values[row]:g} within the batch and {alone:g} alone")
    return values


def _values(function: BoundFunction, batch: ScoringBatch) -> Float32:
    try:
        return run_functions([function], batch).parts[function.name]
    except UserError as error:
        raise AssertionError(str(error)) from error


def _batch(responses: Sequence[str], columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> ScoringBatch:
    return ScoringBatch(
        prompts=[f"prompt {row}" for row in rows],
        responses=[responses[row] for row in rows],
        columns={name: [values[row] for row in rows] for name, values in columns.items()},
        rollouts=[_rollout(row, responses[row]) for row in rows],
        finish_reasons=["stop" for _ in rows],
    )


def _rollout(row: int, text: str) -> Rollout:
    ids = np.frombuffer((text or "\n").encode(), np.uint8).astype(np.int32)
    return Rollout(
        key=SampleKey(0, row, 0),
        prompt_ids=np.arange(1, 4, dtype=np.int32),
        response_ids=ids,
        action_mask=np.ones(len(ids), np.bool_),
        logprobs=np.full(len(ids), -1.0, np.float32),
        versions=np.zeros(len(ids), np.int32),
        finish_reason="stop",
        text=text,
        seed=row,
        rewards=np.zeros(len(ids), np.float32),
    )
