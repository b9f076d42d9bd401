"""`remote`: rewards from the user's own HTTP servers.

A batch is split into requests of `batch_size` samples, `POST {"prompts": [...], "responses": [...]}`. The response is
`{"rewards": [...]}` with one finite number (or null: does not apply) per sample. `rayrlhf.rewards.transport` handles servers
that are slow, flaky, invalid or dead; a failure never becomes a reward.
"""

import json
import math
from typing import Any, Literal

from rayrlhf.errors import UserError
from rayrlhf.rewards.transport import Service, UnusableError, post_all

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
    """Return the rewards [B] of the servers.

    Args:
        prompts: [B].
        responses: [B].
        urls: interchangeable servers; the least busy one gets the next request.
        batch_size: maximum number of samples per request.
        concurrency: maximum number of requests in flight.
        request_seconds: time limit of one attempt, from connecting to the last byte.
        attempts: maximum number of attempts per request.
        backoff_seconds: pause before the second attempt; doubled for each further one.
        max_bytes: maximum length of a response.
        token_variable: environment variable with a bearer token.
        on_failure: after the last failed attempt `stop` the run, or `skip`: None for the whole batch. The step then uses
            the other rewards, and all samples of the batch are measured alike. Without another reward the run stops.

    Raises:
        UserError: an argument is invalid, a server refuses the request, or all attempts failed under `stop`.
    """
    service = Service("remote", urls, concurrency, request_seconds, attempts, backoff_seconds, max_bytes, token_variable)
    service.check(on_failure)
    if batch_size < 1:
        raise UserError(f"reward function 'remote': batch_size {batch_size}: expected at least 1")
    cuts = [slice(start, start + batch_size) for start in range(0, len(responses), batch_size)]
    requests = [{"prompts": prompts[cut], "responses": responses[cut]} for cut in cuts]
    try:
        parts = await post_all(service, requests, lambda body, index: parse_rewards(body, len(responses[cuts[index]])))
    except UnusableError as error:
        if on_failure == "skip":
            return [None] * len(responses)
        raise UserError(f"reward function 'remote': {error}") from None
    return [reward for part in parts for reward in part]


def parse_rewards(body: bytes, count: int) -> Rewards:
    """Return the rewards [count] in the body of a response.

    Raises:
        ValueError: the body is not `{"rewards": [...]}` with `count` finite numbers or nulls.
    """
    content = json.loads(body.decode("utf-8"))  # both errors are ValueErrors
    rewards = content.get("rewards") if isinstance(content, dict) else None
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
