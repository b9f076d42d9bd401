"""A program for any chat model: it plays the guessing game through OpenAI's client, and knows nothing of training.

It needs the package `openai`, which vLLM brings along. `agent.yaml` trains the policy that it talks to.
"""

import functools
from typing import Any

from openai import AsyncOpenAI

TURNS = 4


@functools.cache
def _client() -> AsyncOpenAI:
    """One pool of connections for all games. Nothing is repeated: a second question would be another conversation."""
    return AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, timeout=600)


async def play(prompt: Any, endpoint: Any) -> float:
    """Play one game; returns 1.0 for a win within four guesses, else 0.0."""
    model = _client().with_options(base_url=endpoint.base_url, api_key=endpoint.api_key)
    hidden = int(prompt.columns["hidden"])
    messages: list[Any] = [{"role": "user", "content": prompt.text}]
    for _ in range(TURNS):
        answer = await model.chat.completions.create(model=endpoint.model, messages=messages)
        guess = (answer.choices[0].message.content or "").strip()
        if guess == str(hidden):
            return 1.0
        told = ("<" if hidden < int(guess) else ">") if guess.isdecimal() else "?"
        messages += [{"role": "assistant", "content": guess}, {"role": "user", "content": told}]
    return 0.0
