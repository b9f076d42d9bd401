"""Rewards of a response's steps: split, score of the whole, and payment at tokens.

A process reward model gives each step the probability that it is right. The score of a response is their minimum, product or
sum, or the last one. Each step is rewarded with the change that it makes to the score of the steps so far, so that the rewards
add up to the score.
"""

from bisect import bisect_left
from typing import Literal, NamedTuple

import numpy as np

from rayrlhf.data.records import Float32, Rollout
from rayrlhf.library_types import Tokenizer

Aggregate = Literal["min", "product", "last", "sum"]


class ScoredSteps(NamedTuple):
    """Steps of one response.

    Attributes:
        probabilities: float32 [S], that a step is right, S >= 1.
        ends: [S], characters of the response up to the end of each step, its separator included.
    """

    probabilities: Float32
    ends: list[int]


def split_steps(response: str, separator: str) -> tuple[list[str], list[int]]:
    """Return the steps of a response, and the character at which each ends.

    A step ends with its separator. Blank text between separators belongs to the step before it. A response without any other
    text is one step.
    """
    steps: list[str] = []
    ends: list[int] = []
    place = 0
    for piece in response.split(separator):
        place = min(place + len(piece) + len(separator), len(response))
        if piece.strip():
            steps.append(piece)
            ends.append(place)
        elif ends:
            ends[-1] = place
    return (steps, ends) if steps else ([response], [len(response)])


def step_score(probabilities: Float32, aggregate: Aggregate) -> float:
    """Return the score of a response from its steps, float32 [S]."""
    return float(_running(probabilities, aggregate)[-1])


def step_payments(probabilities: Float32, aggregate: Aggregate) -> Float32:
    """Return the change of the score by each step, float32 [S]; the sum is `step_score`."""
    changes: Float32 = np.diff(_running(probabilities, aggregate), prepend=np.float32(0))
    return changes


def _running(probabilities: Float32, aggregate: Aggregate) -> Float32:
    """Return the score of the steps up to each one, float32 [S]."""
    match aggregate:
        case "min":
            return np.minimum.accumulate(probabilities)
        case "product":
            return np.cumprod(probabilities, dtype=np.float32)
        case "sum":
            return np.cumsum(probabilities, dtype=np.float32)
    return probabilities


def paid_at_tokens(steps: ScoredSteps, aggregate: Aggregate, rollout: Rollout, tokenizer: Tokenizer) -> Float32:
    """Return the payments of a response's steps at their last tokens, float32 [R].

    The last step ends with the response.

    Args:
        steps: of `rollout.text`.
        aggregate: see `step_payments`.
        rollout: a response without an environment.
        tokenizer: of the policy.
    """
    ids = rollout.response_ids.tolist()

    def written(token: int) -> int:
        """Return the characters of the tokens up to and with one."""
        text = tokenizer.decode(ids[: token + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text)

    rewards = np.zeros(len(ids), dtype=np.float32)
    for end, payment in zip(steps.ends[:-1], step_payments(steps.probabilities, aggregate), strict=False):
        rewards[min(bisect_left(range(len(ids)), end, key=written), len(ids) - 1)] += payment
    rewards[-1] += step_payments(steps.probabilities, aggregate)[-1]
    return rewards
