"""A program for any chat model: it plays the guessing game through OpenAI's client, and knows nothing of training.

It needs the package `openai`, which vLLM brings along. `agent.yaml` trains the policy that it talks to.
"""

from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

TURNS = 4


async def play(prompt: Any, endpoint: Any) -> float:
    """Play one game; returns 1.0 for a win within four guesses, else 0.0."""
    hidden = int(prompt.columns["hidden"])
    messages: list[Any] = [{"role": "user", "content": prompt.text}]
    async with _model(endpoint) as model:
        for _ in range(TURNS):
            answer = await model.chat.completions.create(model=endpoint.model, messages=messages)
            guess = (answer.choices[0].message.content or "").strip()
            if guess == str(hidden):
                return 1.0
            told = ("<" if hidden < int(guess) else ">") if guess.isdecimal() else "?"
            messages += [{"role": "assistant", "content": guess}, {"role": "user", "content": told}]
    return 0.0


def _model(endpoint: Any) -> AsyncOpenAI:
    """A client that waits and does not ask twice: a repeated question would be another conversation.

    The endpoint is plain HTTP on this machine: no proxies, and no certificates, whose loading takes longer than a game.
    """
    http = DefaultAsyncHttpxClient(verify=False, trust_env=False)
    return AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, timeout=600, http_client=http)
