"""A taskset of Verifiers: one task per pair of sums, a tool, and a reward."""

import verifiers.v1 as vf
from task import ANSWER, QUESTION, add

__all__ = ["Sums"]


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return add(a, b)


class Sum(vf.Task):
    @vf.reward(weight=0.5)
    async def right(self, trace) -> float:
        return float(trace.last_reply.strip() == ANSWER)

    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        for text in ("no", QUESTION):
            yield Sum(vf.TaskData(prompt=text), self.config.task)


if __name__ == "__main__":
    Adder.run()
