"""The task of all clients: two sums through a tool, and both results as the answer."""

import json
import os

MODEL = os.environ["OPENAI_MODEL"]
QUESTION = "sums?"
ANSWER = "3 and 7"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": SCHEMA}}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: first number.
        b: second number.
    """
    return a + b


def results(calls):
    """Messages with the results of the calls of a chat completion."""
    for call in calls:
        numbers = json.loads(call.function.arguments)
        yield {"role": "tool", "tool_call_id": call.id, "content": str(add(**numbers))}


def check(said, expected=ANSWER):
    """End the program unless the text is what was expected."""
    if said != expected:
        raise SystemExit(f"found {said!r}, expected {expected!r}")
