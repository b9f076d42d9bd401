"""What an environment is: something that answers the policy's turns with words, a reward, and whether it is over.

One object plays one sample. Its methods are coroutines, because many samples wait for their environments at once; whatever
blocks belongs into `asyncio.to_thread`. What it draws it should draw from the seed, so that a sample can be played again.
"""

from dataclasses import dataclass
from typing import Protocol

from rayrlhf.data.records import Int32, Prompt


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the policy.

    Attributes:
        text: what it wrote in this turn, special tokens left out.
        token_ids: int32 [n], n >= 1, the tokens it sampled, the stop token included.
        cut: the turn ended because it was too long.
    """

    text: str
    token_ids: Int32
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the environment makes of a turn.

    Attributes:
        observation: words for the policy; nobody reads them when done.
        reward: what the turn earned.
        done: the sample is over.
    """

    observation: str = ""
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """Plays one sample; made with the `arguments` of the config."""

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Begin. Returns words that stand before the policy's first turn, mostly none; `seed` differs from sample to sample."""
        ...

    async def step(self, action: Action) -> Answer:
        """Answer one turn."""
        ...
