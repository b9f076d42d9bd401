"""Agents for tests: over real HTTP, as an agent that knows nothing of training would ask."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import httpx

from rayrlhf.errors import UserError

STARTED = []
"""Prompts of the samples that some agents were asked to play, in order."""


def ask(endpoint, messages, **fields):
    """One completion: the answer's text. Raises `httpx.HTTPStatusError` when refused."""
    body = {"model": endpoint.model, "messages": messages} | fields
    response = httpx.post(
        f"{endpoint.base_url}/chat/completions",
        content=json.dumps(body),
        headers={"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"},
        timeout=30,
        verify=False,  # plain HTTP; reading the certificates takes up to a second on a busy machine
    )
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def turns(prompt, endpoint, count=2, between="go on", clean=str):
    """One conversation of `count` answers; the reward is their number."""
    messages = [{"role": "user", "content": prompt.text}]
    for _ in range(count):
        said = ask(endpoint, messages)
        messages += [{"role": "assistant", "content": clean(said)}, {"role": "user", "content": between}]
    return float(count)


def stripping(prompt, endpoint):
    return turns(prompt, endpoint, clean=str.strip)


def forgetful(prompt, endpoint):
    """Two answers in one conversation, one in another."""
    turns(prompt, endpoint)
    ask(endpoint, [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "all of it"}])
    return 0.5


def stubborn(prompt, endpoint):
    """Goes on until it is refused, and does not catch that."""
    return turns(prompt, endpoint, count=100)


def content(prompt, endpoint):
    """The same, and takes what it has."""
    try:
        return turns(prompt, endpoint, count=100)
    except httpx.HTTPStatusError as refused:
        return 0.25 if refused.response.json()["error"]["code"] == "context_length_exceeded" else 0.0


async def waiting(prompt, endpoint):
    """Answers the later, the smaller the prompt's id is."""
    for _ in range(2):
        await asyncio.sleep(0.05 * (3 - prompt.id))
        await asyncio.to_thread(ask, endpoint, [{"role": "user", "content": prompt.text}])
    return 1.0


async def over_an_update(prompt, endpoint, first, file, **fields):
    """Two answers; between them all but the `first` samples of a process wait for a file, as for a slow tool."""
    STARTED.append(prompt.id)
    late, end = len(STARTED) > first, time.monotonic() + 60
    messages = [{"role": "user", "content": prompt.text}]
    said = await asyncio.to_thread(ask, endpoint, messages, **fields)
    while late and not Path(file).exists() and time.monotonic() < end:
        await asyncio.sleep(0.02)
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
    await asyncio.to_thread(ask, endpoint, messages, **fields)
    return 1.0


def raising(prompt, endpoint):
    raise RuntimeError("the browser crashed")


def garbled(prompt, endpoint):
    """Asks with half of a pair of surrogates, as a tool that cuts texts does."""
    return ask(endpoint, [{"role": "user", "content": "a\ud800"}])


async def leaving(prompt, endpoint):
    sys.exit(3)


def flaky(prompt, endpoint):
    """Fails the first time, after its first answer."""
    STARTED.append(prompt.id)
    ask(endpoint, [{"role": "user", "content": prompt.text}])
    if len(STARTED) == 1:
        raise RuntimeError("not yet")
    return 1.0


async def resting(prompt, endpoint):
    """Asks once and is never done."""
    await asyncio.to_thread(ask, endpoint, [{"role": "user", "content": prompt.text}])
    await asyncio.sleep(60)


async def sleeping(prompt, endpoint):
    await asyncio.sleep(60)


def blocking(prompt, endpoint):
    time.sleep(60)


async def hogging(prompt, endpoint):
    """Blocks the event loop of all agents the first time."""
    STARTED.append(prompt.id)
    if len(STARTED) == 1:
        time.sleep(3)
    await asyncio.to_thread(ask, endpoint, [{"role": "user", "content": prompt.text}])
    return 1.0


def silent(prompt, endpoint):
    return 1.0


def careless(prompt, endpoint):
    turns(prompt, endpoint, count=1)
    return float("nan")


def mistaken(prompt, endpoint):
    raise UserError("no such column")


def impatient(prompt, endpoint):
    """Is gone before the answer to its second request."""
    ask(endpoint, [{"role": "user", "content": "one"}])
    threading.Thread(target=refused_late, args=(endpoint,), daemon=True).start()
    time.sleep(0.2)
    return 1.0


def refused_late(endpoint):
    try:
        ask(endpoint, [{"role": "user", "content": "two"}])
    except httpx.HTTPError:
        return


def giving_up(prompt, endpoint):
    """Gives a request up, and asks the same again."""
    messages = [{"role": "user", "content": "one"}]
    client = httpx.Client(verify=False, timeout=0.3, headers={"Authorization": f"Bearer {endpoint.api_key}"})
    with client, contextlib.suppress(httpx.ReadTimeout):
        client.post(f"{endpoint.base_url}/chat/completions", json={"messages": messages})
    ask(endpoint, messages)
    return 1.0


def killing(prompt, endpoint, folder):
    """Two answers; between them the first sample of all kills its replica with all that are in flight."""
    messages = [{"role": "user", "content": prompt.text}]
    said = ask(endpoint, messages)
    with contextlib.suppress(FileExistsError):
        (Path(folder) / "killed").touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    ask(endpoint, [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "go on"}])
    return 1.0
