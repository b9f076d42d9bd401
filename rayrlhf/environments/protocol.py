"""Environment protocol: `reset` starts a sample, `step` responds to a turn.

One object plays one sample. Its methods are coroutines, because many samples wait for their environments at once; blocking code
belongs in `asyncio.to_thread`. Random numbers should come from the seed, so that a sample can be repeated. A method `close`, if
there is one, is called once when the sample is over, also after a failure, a time-out or a cancellation.
"""

from dataclasses import dataclass
from typing import Protocol

from rayrlhf.data.records import Int32, Prompt


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the policy.

    Attributes:
        text: text of the turn without special tokens.
        token_ids: int32 [n], n >= 1, the sampled tokens, including the stop token.
        cut: True if the turn ended at its length limit.
    """

    text: str
    token_ids: Int32
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Response of the environment to a turn.

    Attributes:
        observation: text for the policy; ignored when done.
        reward: reward of the turn.
        done: True if the sample is complete.
    """

    observation: str = ""
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """Environment of one sample, created with the `arguments` of the config."""

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Start the sample; returns text before the policy's first turn, often empty.

        `seed` differs from sample to sample.
        """
        ...

    async def step(self, action: Action) -> Answer:
        """Respond to one turn."""
        ...
