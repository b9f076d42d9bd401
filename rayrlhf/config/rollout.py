"""How responses are sampled.

What the policy talks to between its turns.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.demonstrations import RolloutDemonstrationsSection
from rayrlhf.config.section import Section
from rayrlhf.plugins import did_you_mean


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
    def _check_template(self) -> Self:
        if self.template.count("{observation}") != 1:
            raise ValueError("template must have {observation} in it once, where the environment's words go")
        return self


BACKENDS = ("vllm", "transformers")
"""Built-in rollout engines."""


class RolloutSection(Section):
    """Sampling on the rollout replicas. A step samples `prompts_per_step` x `samples_per_prompt` responses."""

    backend: str = "vllm"
    """Rollout engine: `vllm`, `transformers` (needs no vLLM and is slow), `module:Class` or `path/to/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the engine's class."""
    replicas: int = Field(1, ge=1)
    """Copies of the policy that sample."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one replica."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts of a step."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each of them: a group."""
    refill_rounds: int = Field(0, ge=0)
    """Rounds in which other prompts replace those whose responses all scored the same (DAPO's dynamic sampling). When they are
    used up, the step is filled with such prompts."""
    demonstrations: RolloutDemonstrationsSection | None = None
    """Examples that stand before every prompt; none when not given."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of all log-probs. There is no top-p and no top-k: they would make sampler and trainer disagree."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response; the text up to and including the token that completed one is kept."""
    max_model_length: int | None = Field(None, ge=2)
    """Longest prompt + response in tokens; the model's context when not given."""
    max_concurrent: int = Field(256, ge=1)
    """Most requests one replica decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Most KV cache of a replica on a CPU, in GiB; no more is taken than `max_concurrent` full responses can fill."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of the device a replica may use on a GPU."""
    sleep: bool = False
    """Give the GPU memory of weights and KV cache back while models train on the same devices; the next weight sync wakes a
    replica, first its weights, then its cache. With `backend: vllm`; on a CPU nothing is freed."""
    weight_transfer: Literal["shared_memory", "nccl", "ipc"] = "shared_memory"
    """How new weights reach the replicas: through the nodes' shared memory, which works everywhere; or from GPU to GPU by
    vLLM's own transfers, `nccl` to replicas on other GPUs (`placement.mode: disaggregated`), `ipc` to replicas on those of the
    policy (`colocated`). With `backend: vllm`. Neither has been run on a GPU yet."""
    mismatch_alarm: float = Field(0.5, gt=0)
    """Stop when the mean |trainer log-prob - sampler log-prob| of a step exceeds this many nats, over the tokens that the
    newest weights sampled: what older ones did (`async.max_staleness`) differs also by what was learned since."""

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, backend: str) -> str:
        if backend not in BACKENDS and ":" not in backend:
            raise ValueError(
                f"{backend!r} is no rollout engine{did_you_mean(backend, BACKENDS)}; expected {', '.join(BACKENDS)}, "
                "module:Class or path/to/file.py:Class"
            )
        return backend
