"""Client of many sessions: plays each line of its input, an address and a key, and prints the key when it is done."""

import asyncio
import json
import sys

import httpx

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


async def play(client, url, key):
    """A conversation with tool calls until an answer without one."""
    messages = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "How much is 1 + 2 + 3 + 4?"}]
    while True:
        body = {"model": "policy", "messages": messages, "tools": [TOOL]}
        response = await client.post(f"{url}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        response.raise_for_status()
        message = response.json()["choices"][0]["message"]
        messages.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            numbers = json.loads(call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(numbers["a"] + numbers["b"])})
    print(key, message["content"], flush=True)


async def main():
    limits = httpx.Limits(max_connections=1024, max_keepalive_connections=1024)
    async with httpx.AsyncClient(limits=limits, timeout=600, verify=False, trust_env=False) as client:
        loop, tasks = asyncio.get_running_loop(), []
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            tasks.append(asyncio.create_task(play(client, *line.split())))
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main())
