"""LiteLLM: tools and streams, sync and async, through its routes to OpenAI's and Anthropic's APIs."""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from task import MODEL, QUESTION, TOOL, check, results

FIRST = [{"role": "user", "content": QUESTION}]
OPENAI = {
    "model": f"openai/{MODEL}",
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
    "tools": [TOOL],
}
ANTHROPIC = {
    "model": f"anthropic/{MODEL}",
    "api_base": os.environ["ANTHROPIC_BASE_URL"],
    "api_key": os.environ["ANTHROPIC_API_KEY"],
    "tools": [TOOL],
}


def history(message):
    return [*FIRST, message.model_dump(exclude_none=True), *results(message.tool_calls)]


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def asynchronous():
    message = (await litellm.acompletion(messages=FIRST, **OPENAI)).choices[0].message
    chunks = await litellm.acompletion(messages=history(message), stream=True, **OPENAI)
    check(joined([chunk async for chunk in chunks]))


for route in (OPENAI, ANTHROPIC):
    message = litellm.completion(messages=FIRST, **route).choices[0].message
    check(litellm.completion(messages=history(message), **route).choices[0].message.content)
message = litellm.completion(messages=FIRST, **OPENAI).choices[0].message
check(joined(litellm.completion(messages=history(message), stream=True, **OPENAI)))
asyncio.run(asynchronous())
print(1.0)
