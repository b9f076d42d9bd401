"""Scores of a batch from its reward functions.

A sample's score is the weighted sum of the functions' values. `None` means that a function does not apply: its part is NaN
there and adds nothing to the sum. A sample to which no function applies is an error, because a failure must never look like a
reward of 0. For the same reason a function that raises, or returns a value that is not a finite number, stops the run with the
function's name and the sample's index.

Synchronous functions run one after the other in the calling thread (verifiers may use signals). Coroutines run concurrently in
a thread with its own event loop, so the caller may have one running.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rayrlhf.data.fingerprints import reward_seal
from rayrlhf.data.records import Float32, Rollout
from rayrlhf.errors import DeadlineError, UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.returned_values import add_up, checked_values, token_rewards

GRACE_SECONDS = 5.0
"""Time for a cancelled coroutine to end before it is abandoned."""


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Scores of a batch.

    Attributes:
        scores: float32 [B], the weighted sum of the parts.
        parts: name -> float32 [B], unweighted; NaN where the function does not apply.
        tokens: float32 [R] or None per sample, the weighted part of its score that belongs to single tokens; the rest belongs
            to the whole response. None if no function has `per: token` or `per: turn`.
        seals: of each sample with its reward, see `reward_seal`; None for rewards that no actor computed.
    """

    scores: Float32
    parts: dict[str, Float32]
    tokens: list[Float32 | None] | None = None
    seals: list[int] | None = None


def sealed(rewards: RewardBatch, rollouts: Sequence[Rollout]) -> RewardBatch:
    """Return rewards that are bound to their samples."""
    shares = rewards.tokens or [None] * len(rollouts)
    rows = zip(rollouts, rewards.scores.tolist(), shares, strict=True)
    return replace(rewards, seals=[reward_seal(*row) for row in rows])


class FunctionValues(NamedTuple):
    """Values of the reward functions for a batch.

    Attributes:
        parts: name -> float32 [B], NaN for None; sums for functions with `per: token` or `per: turn`.
        tokens: name -> float32 [R] or None per sample, for functions with `per: token` or `per: turn`.
    """

    parts: dict[str, Float32]
    tokens: dict[str, list[Float32 | None]]


def score_batch(functions: Sequence[BoundFunction], batch: ScoringBatch, *, timeout_seconds: float = 120.0) -> RewardBatch:
    """Score a batch with all functions.

    Args:
        timeout_seconds: time limit of a coroutine function. A synchronous function cannot be interrupted here; the driver's own
            deadline on scoring catches it.

    Raises:
        UserError: a function raised, returned a wrong number of values or a value that is not a finite number, or no function
            applies to some sample.
        DeadlineError: a coroutine function exceeded its time limit.
    """
    values = run_functions(functions, batch, timeout_seconds=timeout_seconds)
    return weighted_sum(values.parts, {function.name: function.weight for function in functions}, values.tokens)


def run_functions(functions: Sequence[BoundFunction], batch: ScoringBatch, *, timeout_seconds: float = 120.0) -> FunctionValues:
    """Return each function's checked values; see `score_batch` for arguments and errors."""
    concurrent = {f.name: _call(f, batch) for f in functions if f.is_async}
    waiting = _start(concurrent, timeout_seconds)
    returned = {f.name: _call(f, batch) for f in functions if not f.is_async}
    returned.update(_finish(waiting, timeout_seconds))
    tokens = {f.name: _token_rewards(f, returned[f.name], batch) for f in functions if f.per != "response"}
    sums = {name: [None if row is None else row.sum(dtype=np.float64) for row in rows] for name, rows in tokens.items()}
    parts = {f.name: checked_values(f.name, (sums if f.name in sums else returned)[f.name], len(batch)) for f in functions}
    return FunctionValues(parts, tokens)


def _token_rewards(function: BoundFunction, returned: object, batch: ScoringBatch) -> list[Float32 | None]:
    if batch.rollouts is None:
        raise UserError(
            f"reward function {function.name!r} has per: {function.per}, which needs sampled tokens; this batch has none"
        )
    return token_rewards(function.name, returned, batch.rollouts, function.per)


def weighted_sum(
    parts: Mapping[str, Float32],
    weights: Mapping[str, float],
    tokens: Mapping[str, list[Float32 | None]] | None = None,
    *,
    complete: bool = True,
) -> RewardBatch:
    """Sum parts, of functions and reward models, into scores.

    Args:
        parts: name -> float32 [B], NaN where a part does not apply to a sample.
        weights: name -> factor, for every part.
        tokens: token rewards, see `FunctionValues`.
        complete: there are no other parts; else a sample without any of these has the score 0.

    Raises:
        UserError: no part applies to some sample of complete parts.
    """
    if not parts:
        raise ValueError("no parts to sum")
    values = np.stack([np.asarray(part, dtype=np.float64) for part in parts.values()])
    factors = np.array([weights[name] for name in parts], dtype=np.float64)
    unscored = np.flatnonzero(np.isnan(values).all(axis=0))
    if len(unscored) and complete:
        raise UserError(f"no reward applies to sample {unscored[0]}: all of {', '.join(parts)} returned None")
    scores = (np.nan_to_num(values) * factors[:, None]).sum(axis=0)
    checked = {name: np.asarray(part, dtype=np.float32) for name, part in parts.items()}
    return RewardBatch(scores.astype(np.float32), checked, add_up(tokens, weights) if tokens else None)


def _call(function: BoundFunction, batch: ScoringBatch) -> Any:
    """Call user code; any exception becomes one line that names the function."""
    try:
        return function.call(batch)
    except UserError:
        raise
    except Exception as error:
        raise _blame(function.name, error) from error


def _blame(name: str, error: BaseException) -> UserError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    message = " ".join("".join(traceback.format_exception_only(error)).split())
    return UserError(f"reward function {name!r} raised {message}{where}")


async def _gather(awaitables: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
    since = time.strftime("%H:%M:%S")

    async def one(name: str, awaitable: Any) -> Any:
        try:
            async with asyncio.timeout(timeout_seconds) as limit:
                return await awaitable
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                raise _overrun([name], timeout_seconds, since) from error
            raise _blame(name, error) from error

    values = await asyncio.gather(*(one(name, awaitable) for name, awaitable in awaitables.items()))
    return dict(zip(awaitables, values, strict=True))


def _overrun(names: Sequence[str], timeout_seconds: float, since: str) -> DeadlineError:
    which = ", ".join(repr(name) for name in names)
    return DeadlineError(
        f"reward function {which} did not return within {timeout_seconds:g} s (reward.timeout_seconds), since {since}"
    )


def _start(awaitables: Mapping[str, Any], timeout_seconds: float) -> tuple[list[str], Future[dict[str, Any]]]:
    """Start the coroutines in a daemon thread.

    A coroutine that ignores its cancellation cannot delay the exit.
    """
    future: Future[dict[str, Any]] = Future()

    def loop() -> None:
        try:
            future.set_result(asyncio.run(_gather(awaitables, timeout_seconds)))
        except BaseException as error:  # noqa: BLE001 - passed to the waiting thread, which raises it
            future.set_exception(error)

    if awaitables:
        threading.Thread(target=loop, name="reward-functions", daemon=True).start()
    else:
        future.set_result({})
    return list(awaitables), future


def _finish(waiting: tuple[list[str], Future[dict[str, Any]]], timeout_seconds: float) -> dict[str, Any]:
    names, future = waiting
    since = time.strftime("%H:%M:%S")
    try:
        return future.result(timeout_seconds + GRACE_SECONDS)
    except TimeoutError as error:
        raise _overrun(names, timeout_seconds, since) from error
