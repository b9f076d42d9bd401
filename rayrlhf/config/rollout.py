"""Rollouts: sampling, and the environment of multi-turn responses."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.demonstrations import RolloutDemonstrationsSection
from rayrlhf.config.section import Section
from rayrlhf.plugins import did_you_mean


class EnvironmentSection(Section):
    """Environment or agent of multi-turn responses.

    All turns of a sample, with the observations between them, are one response of at most `rollout.max_new_tokens` tokens.
    """

    name: str
    """Environment: `calculator`, `guessing`, `module:Class` or `path/to/file.py:Class`. Or an agent that calls the policy by
    HTTP: `program`, `module:function` or `path/to/file.py:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, which is constructed for each sample, or of the agent's function."""
    max_turns: int = Field(8, ge=1)
    """Maximum turns of the policy. A sample that is not done by then counts as truncated; further requests of an agent are
    refused."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of a turn; the environment receives the truncated turn. Default: the remaining tokens of the response."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Maximum seconds of one environment step, or between two requests of an agent."""
    retries: int = Field(1, ge=0)
    """Retries of a sample whose environment failed or timed out. Each restarts the sample with the same seeds."""
    max_failed_share: float = Field(0.1, ge=0, lt=1)
    """Maximum share of failed samples in a step, after retries. They are left out; above this share the run stops."""
    credit: Literal["turn", "episode"] = "turn"
    """Position of the environment's rewards. `turn`: each at the last token of its turn. `episode`: their sum at the end."""
    template: str = "{observation}"
    """Text around an observation in the response; for chat models the end of one turn and the start of the next. No effect on
    agents, whose messages use the chat template."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template.count("{observation}") != 1:
            raise ValueError("template: expected {observation} exactly once, the place of the observation")
        return self


BACKENDS = ("vllm", "transformers")
"""Built-in rollout engines."""


class RolloutSection(Section):
    """Sampling on the rollout replicas.

    A step samples `prompts_per_step` x `samples_per_prompt` responses.
    """

    backend: str = "vllm"
    """Rollout engine: `vllm`, `transformers` (needs no vLLM and is slow), `module:Class` or `path/to/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the engine's class."""
    replicas: int = Field(1, ge=1)
    """Rollout replicas: copies of the policy that sample."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per replica."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts per step."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses per prompt: the size of a group."""
    refill_rounds: int = Field(0, ge=0)
    """Maximum rounds of dynamic sampling per step (DAPO): prompts whose responses all have the same score are replaced by
    others. After the last round the rest of the step is filled with such prompts. 0 keeps every prompt."""
    demonstrations: RolloutDemonstrationsSection | None = None
    """Examples before every prompt. Default: none."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum tokens of a response."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling and of all log-probs. There is no top-p or top-k: rollout engine and trainer would disagree."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response. The text is kept up to and including the token that completes one."""
    max_model_length: int | None = Field(None, ge=2)
    """Maximum tokens of prompt and response together. Default: the model's context."""
    max_concurrent: int = Field(256, ge=1)
    """Maximum requests that a replica decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Maximum KV cache of a replica on a CPU, in GiB. Bounded also by what `max_concurrent` full responses fill."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of GPU memory that a replica may use."""
    sleep: bool = False
    """Release the GPU memory of weights and KV cache while models train on the same devices. The next weight sync restores
    first the weights, then the cache. Needs `backend: vllm`. On a CPU nothing is freed."""
    weight_transfer: Literal["shared_memory", "nccl", "ipc"] = "shared_memory"
    """Transport of a weight sync. `shared_memory` works everywhere. `nccl` and `ipc` are vLLM's transfers from GPU to GPU and
    need `backend: vllm`: `nccl` to other GPUs (`placement.mode: disaggregated`), `ipc` on the policy's GPUs (`colocated`).
    Neither has been run on a GPU yet."""
    mismatch_alarm: float = Field(0.5, gt=0)
    """Maximum mean |trainer log-prob - rollout log-prob| of a step, in nats per token; above it the run stops. Only tokens
    sampled with the newest weights count, because older ones (`async.max_staleness`) differ by the updates since."""

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, backend: str) -> str:
        if backend not in BACKENDS and ":" not in backend:
            raise ValueError(
                f"{backend!r} is no rollout engine{did_you_mean(backend, BACKENDS)}; expected {', '.join(BACKENDS)}, "
                "module:Class or path/to/file.py:Class"
            )
        return backend
