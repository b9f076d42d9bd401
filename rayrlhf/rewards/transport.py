"""Questions to HTTP servers that may be slow, flaky or dead: an answer is used whole when it is right, else not at all.

A question that gets no usable answer (no connection, too slow, too long, not what `parse` expects, a status of 429 or 5xx) is
sent again, to another server if there is one, at most `attempts` times in all with doubling pauses. Any other status is a
mistake that no repetition mends, and stops the run. A server that fails several times in a row is left alone for a while
(`rayrlhf.rewards.breaker`). TLS certificates are verified, redirects are not followed.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rayrlhf.errors import UserError
from rayrlhf.rewards.breaker import Breaker, choose

if TYPE_CHECKING:
    import httpx

Answer = TypeVar("Answer")

breakers_of: dict[str, Breaker] = {}
"""URL -> what this process knows of it; outlives a batch, so that a dead server is not asked again by each."""


class UnusableError(Exception):
    """No answer that can be used; another attempt may mend it."""


@dataclass(frozen=True, slots=True)
class Service:
    """Servers that answer alike, and how patiently they are asked.

    Attributes:
        name: of the reward function that asks, for errors.
        urls: the least busy one is asked.
        concurrency: most questions at a time.
        request_seconds: longest time for one attempt, from connecting to the last byte.
        attempts: most attempts for one question.
        backoff_seconds: pause before the second attempt; it doubles with each further one.
        max_bytes: longest answer that is read.
        token_variable: environment variable with a bearer token.
    """

    name: str
    urls: Sequence[str]
    concurrency: int
    request_seconds: float
    attempts: int
    backoff_seconds: float
    max_bytes: int
    token_variable: str | None

    def check(self, on_failure: str) -> None:
        """Check what a user set.

        Raises:
            UserError: something is wrong.
        """
        bad = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if not self.urls or bad:
            raise UserError(f"{self} urls: expected http:// or https:// addresses, got {bad or self.urls}")
        if on_failure not in ("stop", "skip"):
            raise UserError(f"{self} on_failure {on_failure!r}: expected 'stop' or 'skip'")
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"{self} {name} {getattr(self, name)}: expected at least 1")

    def headers(self) -> dict[str, str]:
        """Headers of every question.

        Raises:
            UserError: there is no token where one is named.
        """
        if self.token_variable is None:
            return {}
        token = os.environ.get(self.token_variable)
        if not token:
            raise UserError(f"{self} environment variable {self.token_variable} (token_variable) is not set")
        return {"Authorization": f"Bearer {token}"}

    def __str__(self) -> str:
        return f"reward function {self.name!r}:"


async def ask_all(
    service: Service, questions: Sequence[Mapping[str, Any]], parse: Callable[[bytes, int], Answer]
) -> list[Answer]:
    """Ask all questions, several at a time; returns their answers in order.

    Args:
        service: whom.
        questions: bodies of the requests.
        parse: from an answer's body and the question's index to what it says; a ValueError is an answer that cannot be used.

    Raises:
        UserError: a server refuses a question.
        UnusableError: the attempts for one are used up.
    """
    # Heavy enough to be paid only by those who use it.
    import httpx

    gate = asyncio.Semaphore(service.concurrency)
    headers = service.headers()
    async with httpx.AsyncClient(timeout=service.request_seconds, follow_redirects=False, headers=headers) as client:

        async def one(index: int) -> Answer:
            async with gate:
                return await _ask(client, service, questions[index], lambda body: parse(body, index))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(len(questions))]
        except ExceptionGroup as group_of_errors:
            errors = group_of_errors.exceptions
            raise next((error for error in errors if not isinstance(error, UnusableError)), errors[0]) from None
    return [task.result() for task in tasks]


async def _ask(
    client: "httpx.AsyncClient", service: Service, question: Mapping[str, Any], parse: Callable[[bytes], Answer]
) -> Answer:
    """Try until an answer can be used."""
    why = "not asked"
    for attempt in range(service.attempts):
        if attempt:
            await asyncio.sleep(service.backoff_seconds * 2 ** (attempt - 1))
        breakers = [breakers_of.setdefault(url, Breaker()) for url in service.urls]
        index = choose(breakers, time.monotonic())
        if index is None:
            why = f"{why}; all {len(breakers)} servers failed lately and are left alone for a while"
            continue
        breaker, url = breakers[index], service.urls[index]
        breaker.begin()
        try:
            answer = await _post(client, service, url, question, parse)
        except UnusableError as error:
            breaker.fail(time.monotonic())
            why = f"{url}: {error}"
        except BaseException:
            breaker.abandon()
            raise
        else:
            breaker.succeed()
            return answer
    raise UnusableError(f"no usable answer in {service.attempts} attempts; last: {why}")


async def _post(
    client: "httpx.AsyncClient", service: Service, url: str, question: Mapping[str, Any], parse: Callable[[bytes], Answer]
) -> Answer:
    """One attempt."""
    import httpx

    try:
        async with asyncio.timeout(service.request_seconds):
            async with client.stream("POST", url, json=question) as response:
                if response.status_code == 429 or response.status_code >= 500:
                    raise UnusableError(f"status {response.status_code}")
                if response.status_code != 200:
                    raise UserError(f"{service} {url} answered with status {response.status_code}, expected 200")
                body = b""
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > service.max_bytes:
                        raise UnusableError(f"an answer of more than {service.max_bytes} bytes (max_bytes)")
        return parse(body)
    except TimeoutError as error:
        raise UnusableError(f"no answer within {service.request_seconds:g} s (request_seconds)") from error
    except httpx.HTTPError as error:
        raise UnusableError(f"{type(error).__name__} {error}") from error
    except ValueError as error:
        raise UnusableError(f"not the agreed answer: {error}") from error
