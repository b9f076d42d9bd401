"""Agent with a calculator and a lookup tool, over OpenAI's client.

It knows nothing of training. It needs the package `openai`, which vLLM brings along. `calculator.yaml` trains the policy that
it talks to.
"""

import json
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from rayrlhf.data.toy.played_turns import TOOLS, record

TURNS = 3


async def solve(prompt: Any, endpoint: Any) -> float:
    """Ask for a sum or a record, and run the tools as often as the model calls them.

    Returns:
        1.0 for the right answer, else 0.0.
    """
    tools: Any = list(TOOLS.values())
    messages: list[Any] = [{"role": "user", "content": prompt.text}]
    async with _model(endpoint) as model:
        for _ in range(TURNS):
            answer = await model.chat.completions.create(model=endpoint.model, messages=messages, tools=tools)
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return float((message.content or "").strip() == prompt.columns["answer"])
            for call in message.tool_calls:
                if call.type == "function":
                    result = run(call.function.name, call.function.arguments)
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


def run(name: str, arguments: str) -> str:
    """Run a tool on the JSON of a call."""
    try:
        text = json.loads(arguments)["s"]
        return record(int(text.removeprefix("N-"))) if name == "get" else str(sum(int(part) for part in text.split("+")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "?"


def _model(endpoint: Any) -> AsyncOpenAI:
    """Return a client that waits and does not ask twice.

    The endpoint is plain HTTP on this machine: no proxies, and no certificates, whose loading takes longer than a sample.
    """
    http = DefaultAsyncHttpxClient(verify=False, trust_env=False)
    return AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, timeout=600, http_client=http)
