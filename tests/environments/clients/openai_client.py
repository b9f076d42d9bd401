"""OpenAI's clients: tools and streams, sync and async, of chat completions and responses."""

import asyncio
import json

from openai import AsyncOpenAI, OpenAI
from task import MODEL, QUESTION, SCHEMA, TOOL, add, check, results

FIRST = [{"role": "user", "content": QUESTION}]
FIELDS = {"model": MODEL, "tools": [TOOL]}


def plain(client):
    message = client.chat.completions.create(messages=FIRST, **FIELDS).choices[0].message
    history = [*FIRST, message.model_dump(exclude_none=True), *results(message.tool_calls)]
    check(client.chat.completions.create(messages=history, **FIELDS).choices[0].message.content)


def streamed(client):
    with client.chat.completions.stream(messages=FIRST, **FIELDS) as stream:
        message = stream.get_final_completion().choices[0].message
    history = [*FIRST, message.model_dump(exclude_none=True, exclude={"parsed"}), *results(message.tool_calls)]
    chunks = client.chat.completions.create(messages=history, stream=True, **FIELDS)
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


async def asynchronous():
    async with AsyncOpenAI(max_retries=0) as client:
        message = (await client.chat.completions.create(messages=FIRST, **FIELDS)).choices[0].message
        history = [*FIRST, message.model_dump(exclude_none=True), *results(message.tool_calls)]
        said = ""
        async for chunk in await client.chat.completions.create(messages=history, stream=True, **FIELDS):
            said += chunk.choices[0].delta.content or ""
        check(said)


def responses(client):
    tools = [{"type": "function", "name": "add", "description": "Add two numbers.", "parameters": SCHEMA, "strict": False}]
    items = [{"role": "user", "content": QUESTION}]
    output = client.responses.create(model=MODEL, input=items, tools=tools).output
    items += [item.model_dump(exclude_none=True) for item in output]
    for item in output:
        if item.type == "function_call":
            said = str(add(**json.loads(item.arguments)))
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": said})
    with client.responses.stream(model=MODEL, input=items, tools=tools) as stream:
        check(stream.get_final_response().output_text)


with OpenAI(max_retries=0) as client:
    plain(client)
    streamed(client)
    responses(client)
asyncio.run(asynchronous())
print(1.0)
