"""OpenAI's Agents SDK on chat completions and on responses: run and streamed."""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from task import MODEL, QUESTION, add, check

set_tracing_disabled(True)


async def main():
    client = AsyncOpenAI(max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent(
            name="sums", instructions="Add.", tools=[function_tool(add)], model=kind(model=MODEL, openai_client=client)
        )
        check((await Runner.run(agent, QUESTION)).final_output)
        result = Runner.run_streamed(agent, QUESTION)
        async for _ in result.stream_events():
            pass
        check(result.final_output)


asyncio.run(main())
print(1.0)
