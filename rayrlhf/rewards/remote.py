"""Rewards from HTTP servers, and never a made-up one: an answer is used whole when it is right, and not at all otherwise.

A batch is cut into requests of `batch_size` samples, `POST {"prompts": [...], "responses": [...]}`; the answer is
`{"rewards": [...]}` with one finite number (or null: does not apply) per sample. A request that gets no usable answer (no
connection, too slow, too long, not the agreed JSON, a status of 429 or 5xx) is sent again, to another server if there is one,
at most `attempts` times in all with doubling pauses. Any other status is a mistake that no repetition mends, and stops the run.
"""

import asyncio
import json
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayrlhf.errors import UserError
from rayrlhf.rewards.breaker import Breaker, choose

if TYPE_CHECKING:
    import httpx

Rewards = list[float | None]

_breakers: dict[str, Breaker] = {}
"""URL -> what this process knows of it; outlives a batch, so that a dead server is not asked again by each."""


class _UnusableError(Exception):
    """An answer that another attempt may mend."""


@dataclass(frozen=True, slots=True)
class _Service:
    urls: list[str]
    request_seconds: float
    attempts: int
    backoff_seconds: float
    max_bytes: int
    headers: dict[str, str]


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
    """Return the rewards [B] that servers give; TLS certificates are verified, redirects are not followed.

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
    _check(urls, on_failure, {"batch_size": batch_size, "concurrency": concurrency, "attempts": attempts})
    service = _Service(urls, request_seconds, attempts, backoff_seconds, max_bytes, _headers(token_variable))
    # Heavy enough to be paid only by those who use it.
    import httpx

    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=request_seconds, follow_redirects=False) as client:

        async def one(start: int) -> Rewards:
            async with gate:
                cut = slice(start, start + batch_size)
                return await _ask(client, service, {"prompts": prompts[cut], "responses": responses[cut]})

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(start)) for start in range(0, len(responses), batch_size)]
        except ExceptionGroup as group_of_errors:
            errors = group_of_errors.exceptions
            worse = [error for error in errors if not isinstance(error, _UnusableError)]
            if worse:
                raise worse[0] from None
            if on_failure == "skip":
                return [None] * len(responses)
            raise UserError(f"reward function 'remote': {errors[0]}") from None
    return [reward for task in tasks for reward in task.result()]


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


async def _ask(client: "httpx.AsyncClient", service: _Service, payload: dict[str, list[str]]) -> Rewards:
    """Try until an answer can be used."""
    why = "not asked"
    for attempt in range(service.attempts):
        if attempt:
            await asyncio.sleep(service.backoff_seconds * 2 ** (attempt - 1))
        breakers = [_breakers.setdefault(url, Breaker()) for url in service.urls]
        index = choose(breakers, time.monotonic())
        if index is None:
            why = f"{why}; all {len(breakers)} servers failed lately and are left alone for a while"
            continue
        breaker, url = breakers[index], service.urls[index]
        breaker.begin()
        try:
            rewards = await _post(client, service, url, payload)
        except _UnusableError as error:
            breaker.fail(time.monotonic())
            why = f"{url}: {error}"
        except BaseException:
            breaker.abandon()
            raise
        else:
            breaker.succeed()
            return rewards
    raise _UnusableError(f"no usable answer in {service.attempts} attempts; last: {why}")


async def _post(client: "httpx.AsyncClient", service: _Service, url: str, payload: dict[str, list[str]]) -> Rewards:
    """One attempt."""
    import httpx

    try:
        async with asyncio.timeout(service.request_seconds):
            async with client.stream("POST", url, json=payload, headers=service.headers) as response:
                if response.status_code == 429 or response.status_code >= 500:
                    raise _UnusableError(f"status {response.status_code}")
                if response.status_code != 200:
                    raise UserError(
                        f"reward function 'remote': {url} answered with status {response.status_code}, expected 200"
                    )
                body = b""
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > service.max_bytes:
                        raise _UnusableError(f"an answer of more than {service.max_bytes} bytes (max_bytes)")
        return parse_rewards(body, len(payload["responses"]))
    except TimeoutError as error:
        raise _UnusableError(f"no answer within {service.request_seconds:g} s (request_seconds)") from error
    except httpx.HTTPError as error:
        raise _UnusableError(f"{type(error).__name__} {error}") from error
    except ValueError as error:
        raise _UnusableError(f"not the agreed answer: {error}") from error


def _check(urls: list[str], on_failure: str, positive: dict[str, int]) -> None:
    bad = [url for url in urls if not url.startswith(("http://", "https://"))]
    if not urls or bad:
        raise UserError(f"reward function 'remote': urls: expected http:// or https:// addresses, got {bad or urls}")
    if on_failure not in ("stop", "skip"):
        raise UserError(f"reward function 'remote': on_failure {on_failure!r}: expected 'stop' or 'skip'")
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"reward function 'remote': {name} {value}: expected at least 1")


def _headers(token_variable: str | None) -> dict[str, str]:
    if token_variable is None:
        return {}
    if not os.environ.get(token_variable):
        raise UserError(f"reward function 'remote': environment variable {token_variable} (token_variable) is not set")
    return {"Authorization": f"Bearer {os.environ[token_variable]}"}


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
