"""Program that plays a task of a taskset of Verifiers, with the taskset's tools and rewards.

    python examples/agents/verifiers_task.py --rows my-taskset > tasks.jsonl

writes a row per task, the dataset of a run whose agent is this program:

    environment:
      name: program
      arguments: {command: [python, examples/agents/verifiers_task.py, my-taskset]}

It needs the packages `verifiers` (0.4) and `uv`, which may live in another Python environment than rayrlhf.
"""

import argparse
import asyncio
import json
import os
import sys

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import load_environment, load_taskset, resolve_env_config


def rows(taskset: str) -> None:
    """Print a row per task: its prompt, and its number in the column `task`."""
    config = resolve_env_config({"taskset": {"id": taskset}})
    for task in load_taskset(config.taskset):
        print(json.dumps({"prompt": task.data.prompt_text, "task": task.data.idx}))


async def play(taskset: str, harness: str, number: int) -> float:
    """Play a task with one agent on this machine.

    Args:
        harness: program of the agent; `null` is a conversation with the taskset's tools.

    Returns:
        The sum of its weighted rewards.

    Raises:
        RuntimeError: the episode failed.
    """
    agent = {"harness": {"id": harness}, "runtime": {"type": "subprocess"}}
    env = load_environment(resolve_env_config({"taskset": {"id": taskset}, "agent": agent}))
    (task,) = env.taskset.include(idx=[number])
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with env.serving():
        episode = await env.run_episode(task, vf.ModelContext(os.environ["OPENAI_MODEL"], client))
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if errors:
        raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}")
    return sum(trace.reward for trace in episode.traces)


def main() -> None:
    """Read a sample from standard input and print its reward, or print the rows of a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("taskset")
    parser.add_argument("--harness", default="null")
    parser.add_argument("--rows", action="store_true")
    arguments = parser.parse_args()
    if arguments.rows:
        rows(arguments.taskset)
        return
    number = int(json.loads(sys.stdin.readline())["columns"]["task"])
    print(asyncio.run(play(arguments.taskset, arguments.harness, number)))


if __name__ == "__main__":
    main()
