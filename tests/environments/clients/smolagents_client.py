"""smolagents: an agent that calls tools, plain and streamed, and one that writes code."""

import os

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool
from task import MODEL, QUESTION, add, check

model = OpenAIModel(model_id=MODEL, api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
for streamed in (False, True):
    agent = ToolCallingAgent(tools=[tool(add)], model=model, max_steps=4, stream_outputs=streamed, verbosity_level=0)
    check(agent.run(QUESTION))
check(CodeAgent(tools=[tool(add)], model=model, max_steps=4, verbosity_level=0).run(QUESTION), 10)
print("\n1.0")  # streams are shown without a last new line
