"""`remote`: rewards from HTTP servers of yours, and never a made-up one.

A batch is cut into requests of `batch_size` samples, `POST {"prompts": [...], "responses": [...]}`; the answer is
`{"rewards": [...]}` with one finite number (or null: does not apply) per sample. How servers are asked, and what happens to one
that is slow, flaky, returns garbage or dies: `rayrlhf.rewards.transport`.
"""

import json
import math
from typing import Any, Literal

from rayrlhf.errors import UserError
from rayrlhf.rewards.transport import Service, UnusableError, ask_all

Rewards = list[float | None]


async def remote(
    prompts: list[str],
    responses: list[str],
    urls: list[str],
    batch_size: int = 32,
    concurrency: int = 8,
    request_seconds: float = 20.0,
    attempts: int = 4,
    backoff_seconds: float = 0.5,
    max_bytes: int = 4_000_000,
    token_variable: str | None = None,
    on_failure: Literal["stop", "skip"] = "stop",
) -> Rewards:
    """Return the rewards [B] that servers give.

    Args:
        prompts: [B].
        responses: [B].
        urls: servers that answer alike; the least busy one is asked.
        batch_size: most samples in a request.
        concurrency: most requests at a time.
        request_seconds: longest time for one attempt, from connecting to the last byte.
        attempts: most attempts for one request.
        backoff_seconds: pause before the second attempt; it doubles with each further one.
        max_bytes: longest answer that is read.
        token_variable: environment variable with a bearer token.
        on_failure: after the last attempt `stop` the run, or `skip`: None for the whole batch, so that the step goes on with
            the other rewards and no two samples of the batch are measured differently. With no other reward the run stops.

    Raises:
        UserError: an argument is wrong, a server refuses the request, or the attempts are used up under `stop`.
    """
    service = Service("remote", urls, concurrency, request_seconds, attempts, backoff_seconds, max_bytes, token_variable)
    service.check(on_failure)
    if batch_size < 1:
        raise UserError(f"reward function 'remote': batch_size {batch_size}: expected at least 1")
    cuts = [slice(start, start + batch_size) for start in range(0, len(responses), batch_size)]
    questions = [{"prompts": prompts[cut], "responses": responses[cut]} for cut in cuts]
    try:
        answers = await ask_all(service, questions, lambda body, index: parse_rewards(body, len(responses[cuts[index]])))
    except UnusableError as error:
        if on_failure == "skip":
            return [None] * len(responses)
        raise UserError(f"reward function 'remote': {error}") from None
    return [reward for answer in answers for reward in answer]


def parse_rewards(body: bytes, count: int) -> Rewards:
    """Return the rewards [count] of an answer's body.

    Raises:
        ValueError: it is not `{"rewards": [...]}` with `count` finite numbers or nulls.
    """
    answer = json.loads(body.decode("utf-8"))  # both errors are ValueErrors
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise ValueError('expected {"rewards": [...]}')
    if len(rewards) != count:
        raise ValueError(f"expected {count} rewards, got {len(rewards)}")
    for index, reward in enumerate(rewards):
        if reward is None:
            continue
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not _finite(reward):
            raise ValueError(f"reward {index} is {str(reward)[:40]!r}, expected a finite number or null")
    return [None if reward is None else float(reward) for reward in rewards]


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
