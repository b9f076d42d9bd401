"""What the policy talks to between its turns."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section


class EnvironmentSection(Section):
    """An environment that answers the policy's turns.

    All turns of a sample, with what the environment says between them, are one response of at most `rollout.max_new_tokens`
    tokens.
    """

    name: str
    """`calculator`, `guessing`, `module:Class` or `path/to/file.py:Class`; or an agent that asks the policy by HTTP: `program`,
    `module:function` or `path/to/file.py:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, which is made anew for each sample, or of the agent's function."""
    max_turns: int = Field(8, ge=1)
    """Turns of the policy; a sample that is not done by then counts as cut off. An agent is refused further ones."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """Longest turn in tokens; the environment sees a turn that was cut here. As much as the response has room for when not
    given."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Longest time that one answer of the environment may take, or an agent until its next request."""
    retries: int = Field(1, ge=0)
    """How often a sample whose environment failed or overran is played again from its start, with the same seeds."""
    max_failed_share: float = Field(0.1, ge=0, lt=1)
    """Samples that still failed are left out of the step; the run stops when they are more than this share of it."""
    credit: Literal["turn", "episode"] = "turn"
    """Where the part `environment` of the score is paid: `turn` pays each reward at the last token of the turn that earned it,
    `episode` pays the sum at the end."""
    template: str = "{observation}"
    """Text that carries an observation into the response, for chat models the end of the old turn and the head of the next. Not
    for agents, whose messages go through the chat template."""

    @model_validator(mode="after")
    def _the_template_holds_the_observation(self) -> Self:
        if self.template.count("{observation}") != 1:
            raise ValueError("template must have {observation} in it once, where the environment's words go")
        return self
