"""What a simulated run is made of: rates that were measured somewhere, a cluster's size, lengths, failures."""

from pydantic import Field

from rayrlhf.config.section import Section


class LengthSection(Section):
    """Response lengths: log-normal, cut at `rollout.max_new_tokens` of the simulated run. A spread of 0 makes all equal."""

    median: float = Field(256.0, gt=0)
    """In tokens."""
    spread: float = Field(0.8, ge=0)
    """Standard deviation of the logarithm; long-tailed reasoning has 1 and more."""


class RateSection(Section):
    """How fast the parts are. A run's metrics have them: `time/*` and `speed/*`."""

    token_seconds: float = Field(0.02, gt=0)
    """Time of one token of one response, on a replica with all its places taken."""
    score_tokens: float = Field(100_000.0, gt=0)
    """Tokens a second through reward, reference, critic and old log-probs together."""
    update_tokens: float = Field(20_000.0, gt=0)
    """Tokens a second through an update, all epochs included, all ranks together."""
    sync_seconds: float = Field(1.0, ge=0)
    """Time in which a weight sync keeps all replicas from sampling."""
    prompt_tokens: float = Field(128.0, ge=0)
    """Tokens of a prompt; scored and trained with the response, free to sample."""


class FailureSection(Section):
    """Replicas that die now and then."""

    hours_between: float | None = Field(None, gt=0)
    """Mean time between failures of one replica, in hours; none when not given."""
    rebuild_seconds: float = Field(120.0, ge=0)
    """Time until another process serves in its place."""


class SimulationConfig(Section):
    """Everything `rayrlhf plan --simulate` needs beside the run's own configuration."""

    steps: int = Field(20, ge=2)
    """PPO steps to simulate; the first only fills the pipeline and is not in the averages."""
    replicas: int | None = Field(None, ge=1)
    """Rollout replicas; `rollout.replicas` when not given."""
    max_staleness: int | None = Field(None, ge=0)
    """Weight versions that a response may be behind when it is trained on; `async.max_staleness` of the run when not given."""
    lengths: LengthSection = LengthSection()
    rates: RateSection = RateSection()
    failures: FailureSection = FailureSection()
    seed: int = 0
