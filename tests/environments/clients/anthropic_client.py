"""Anthropic's clients: tools and streams, sync and async."""

import asyncio
import os

from anthropic import Anthropic, AsyncAnthropic
from task import QUESTION, SCHEMA, add, check

FIRST = [{"role": "user", "content": QUESTION}]
TOOL = {"name": "add", "description": "Add two numbers.", "input_schema": SCHEMA}
FIELDS = {"model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 900, "tools": [TOOL]}


def history(message):
    uses = [block for block in message.content if block.type == "tool_use"]
    found = [{"type": "tool_result", "tool_use_id": use.id, "content": str(add(**use.input))} for use in uses]
    return [*FIRST, {"role": "assistant", "content": message.content}, {"role": "user", "content": found}]


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


async def asynchronous():
    async with AsyncAnthropic(max_retries=0) as client:
        message = await client.messages.create(messages=FIRST, **FIELDS)
        async with client.messages.stream(messages=history(message), **FIELDS) as stream:
            check("".join([part async for part in stream.text_stream]))


with Anthropic(max_retries=0) as client:
    message = client.messages.create(messages=FIRST, **FIELDS)
    check(message.stop_reason, "tool_use")
    check(text(client.messages.create(messages=history(message), **FIELDS)))
    with client.messages.stream(messages=FIRST, **FIELDS) as stream:
        message = stream.get_final_message()
    check(text(client.messages.create(messages=history(message), **FIELDS)))
asyncio.run(asynchronous())
print(1.0)
