"""A short supervised start before PPO."""

from pydantic import Field

from rayrlhf.config.section import Section


class WarmupSection(Section):
    """Imitate given responses for a moment, so that rewards which ask for a form have something to reinforce."""

    response_field: str
    """Column of `data.train` that holds the response to imitate."""
    samples: int = Field(256, ge=1)
    """Rows to imitate, the first of the shuffled training prompts; each is seen once."""
    mini_batch_size: int = Field(16, ge=1)
    """Samples of one optimizer step, at the policy's own learning rate."""
