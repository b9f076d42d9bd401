"""Sampling ahead: rollouts of later steps while the policy still trains."""

from typing import Literal

from pydantic import Field

from rayrlhf.config.section import Section


class AsyncSection(Section):
    """How far sampling may run ahead of training.

    With `max_staleness` above 0, importance weights against the sampler are on (`algorithm.correction.level: token`), unless
    that level is given.
    """

    max_staleness: int = Field(0, ge=0)
    """Most weight versions that a token may be old when it is learned from. 0: every step waits for its own responses, sampled
    with the newest weights."""
    on_update: Literal["continue", "cut"] = "continue"
    """What becomes of unfinished responses when new weights come: they go on with them, or begin anew."""
