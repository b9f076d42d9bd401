"""LangGraph's ReAct agent on LangChain's chat model: sync, async and streamed."""

import asyncio
import os

from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from task import ANSWER, MODEL, QUESTION, add, check

FIRST = {"messages": [("user", QUESTION)]}
model = ChatOpenAI(
    model=MODEL, base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"], max_retries=0, timeout=300
)
agent = create_react_agent(model, [add])
check(agent.invoke(FIRST)["messages"][-1].content)
check([state["messages"][-1].content for state in agent.stream(FIRST, stream_mode="values")][-1])
said = "".join(part.content for part, _ in agent.stream(FIRST, stream_mode="messages"))
check(said[-len(ANSWER) :])
check(asyncio.run(agent.ainvoke(FIRST))["messages"][-1].content)
print(1.0)
