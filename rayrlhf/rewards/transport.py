"""HTTP requests to reward servers that may be slow, flaky or dead.

A response is used only as a whole and only when it is valid. A request without a valid response (no connection, too slow, too
long, refused by `parse`, a status of 429 or 5xx) is sent again, to another server if there is one. There are at most `attempts`
attempts with doubling pauses. Any other status is a permanent mistake and stops the run. TLS certificates are verified,
redirects are not followed.

Each server has a circuit breaker with three states. Closed: requests go through. Open, after `failures_to_open` failures in a
row: no request for `open_seconds`. Half open, after that time: one trial request; its success closes the breaker, its failure
opens it again. The breaker is pure: the caller passes the time.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rayrlhf.errors import UserError

if TYPE_CHECKING:
    import httpx

Parsed = TypeVar("Parsed")


@dataclass(slots=True)
class Breaker:
    """Circuit breaker of one server.

    Attributes:
        failures_to_open: failures in a row that open it.
        open_seconds: seconds for which it then admits no request.
        failures: failures in a row so far.
        opened_at: time when it opened, in seconds of the caller's clock; None while closed.
        started: requests started so far.
    """

    failures_to_open: int = 3
    open_seconds: float = 10.0
    failures: int = 0
    opened_at: float | None = None
    in_flight: int = 0
    started: int = 0

    def admits(self, now: float) -> bool:
        """Return True if a request may start at `now` (seconds of a monotonic clock)."""
        if self.opened_at is None:
            return True
        return now - self.opened_at >= self.open_seconds and self.in_flight == 0

    def begin(self) -> None:
        """Count a started request."""
        self.in_flight += 1
        self.started += 1

    def succeed(self) -> None:
        """Count a request with a valid response."""
        self.in_flight -= 1
        self.failures = 0
        self.opened_at = None

    def fail(self, now: float) -> None:
        """Count a request without a valid response at `now`."""
        self.in_flight -= 1
        self.failures += 1
        if self.opened_at is not None or self.failures >= self.failures_to_open:
            self.opened_at = now

    def abandon(self) -> None:
        """Count a cancelled request: neither success nor failure."""
        self.in_flight -= 1


def choose(breakers: Sequence[Breaker], now: float) -> int | None:
    """Return the index of the least busy server that admits a request, or None.

    Ties go to the server with the fewest requests so far.
    """
    admitted = [index for index, breaker in enumerate(breakers) if breaker.admits(now)]
    return min(admitted, key=lambda index: (breakers[index].in_flight, breakers[index].started, index), default=None)


breakers_of: dict[str, Breaker] = {}
"""URL -> breaker; outlives a batch, so that a dead server is not tried again by every batch."""


class UnusableError(Exception):
    """No valid response; another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Service:
    """Interchangeable servers and the limits of requests to them.

    Attributes:
        name: name of the reward function, for errors.
        urls: the least busy one gets the next request.
        concurrency: maximum number of requests in flight.
        request_seconds: time limit of one attempt, from connecting to the last byte.
        attempts: maximum number of attempts per request.
        backoff_seconds: pause before the second attempt; doubled for each further one.
        max_bytes: maximum length of a response.
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
        """Check the settings.

        Raises:
            UserError: a setting is invalid.
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
        """Return the headers of every request.

        Raises:
            UserError: the environment variable of the token is not set.
        """
        if self.token_variable is None:
            return {}
        token = os.environ.get(self.token_variable)
        if not token:
            raise UserError(f"{self} environment variable {self.token_variable} (token_variable) is not set")
        return {"Authorization": f"Bearer {token}"}

    def __str__(self) -> str:
        return f"reward function {self.name!r}:"


async def post_all(
    service: Service, requests: Sequence[Mapping[str, Any]], parse: Callable[[bytes, int], Parsed]
) -> list[Parsed]:
    """Send all requests, several at a time; returns the parsed responses in order.

    Args:
        requests: JSON bodies.
        parse: converts a response's body and the request's index; a ValueError marks an invalid response.

    Raises:
        UserError: a server refuses a request.
        UnusableError: all attempts of one failed.
    """
    # Imported on first use: it is slow to import.
    import httpx

    gate = asyncio.Semaphore(service.concurrency)
    headers = service.headers()
    async with httpx.AsyncClient(timeout=service.request_seconds, follow_redirects=False, headers=headers) as client:

        async def one(index: int) -> Parsed:
            async with gate:
                return await _post(client, service, requests[index], lambda body: parse(body, index))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(len(requests))]
        except ExceptionGroup as group_of_errors:
            errors = group_of_errors.exceptions
            raise next((error for error in errors if not isinstance(error, UnusableError)), errors[0]) from None
    return [task.result() for task in tasks]


async def _post(
    client: "httpx.AsyncClient", service: Service, request: Mapping[str, Any], parse: Callable[[bytes], Parsed]
) -> Parsed:
    """Try until a response is valid."""
    reason = "not sent"
    for attempt in range(service.attempts):
        if attempt:
            await asyncio.sleep(service.backoff_seconds * 2 ** (attempt - 1))
        breakers = [breakers_of.setdefault(url, Breaker()) for url in service.urls]
        index = choose(breakers, time.monotonic())
        if index is None:
            reason = f"{reason}; all {len(breakers)} servers failed lately and get no request for a while"
            continue
        breaker, url = breakers[index], service.urls[index]
        breaker.begin()
        try:
            parsed = await _attempt(client, service, url, request, parse)
        except UnusableError as error:
            breaker.fail(time.monotonic())
            reason = f"{url}: {error}"
        except BaseException:
            breaker.abandon()
            raise
        else:
            breaker.succeed()
            return parsed
    raise UnusableError(f"no valid response in {service.attempts} attempts; last: {reason}")


async def _attempt(
    client: "httpx.AsyncClient", service: Service, url: str, request: Mapping[str, Any], parse: Callable[[bytes], Parsed]
) -> Parsed:
    """Send a request once."""
    import httpx

    try:
        async with asyncio.timeout(service.request_seconds):
            async with client.stream("POST", url, json=request) as response:
                if response.status_code == 429 or response.status_code >= 500:
                    raise UnusableError(f"status {response.status_code}")
                if response.status_code != 200:
                    raise UserError(f"{service} {url} responded with status {response.status_code}, expected 200")
                body = b""
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > service.max_bytes:
                        raise UnusableError(f"a response of more than {service.max_bytes} bytes (max_bytes)")
        return parse(body)
    except TimeoutError as error:
        raise UnusableError(f"no response within {service.request_seconds:g} s (request_seconds)") from error
    except httpx.HTTPError as error:
        raise UnusableError(f"{type(error).__name__} {error}") from error
    except ValueError as error:
        raise UnusableError(f"invalid response: {error}") from error
