"""Rollouts: sampling, demonstrations in prompts, and the environment of multi-turn responses."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.section import Section
from rayrlhf.plugins import did_you_mean


class SelectionSection(Section):
    """Selection of the examples shown with a target."""

    selection: Literal["random", "bm25", "nearest"] = "random"
    """Ranking of the examples: `random`, `bm25` by shared words of the prompts, `nearest` by the cosine of `encoder`'s
    vectors."""
    order: Literal["near_to_far", "far_to_near"] = "far_to_near"
    """Order in the prompt; `far_to_near` puts the nearest example next to the question."""
    encoder: str | None = None
    """Encoder of `selection: nearest`: a folder, hub name or built-in."""
    pooling: Literal["mean", "cls"] | None = None
    """Pooling of the encoder's states. Default: that of the encoder's folder."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """Minimum Jaccard index of three-word shingles from which an example counts as a near-duplicate of the target, and is
    never shown."""
    resembling_words: int = Field(8, ge=1)
    """Minimum words of a text or answer for this comparison."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if (self.encoder is not None) != (self.selection == "nearest"):
            raise ValueError("encoder and selection nearest belong together: set both or neither")
        return self


class ContextSection(Section):
    """Layout of demonstrations and question."""

    layout: Literal["turns", "system", "text"] = "turns"
    """`turns`: a user and an assistant turn per example. `system`: all examples in the system turn. `text`: plain text, for
    models without a chat template."""
    question: str = "{prompt}\n"
    """Format of a question under `system` and `text`, up to the start of the answer."""
    separator: str = "\n\n"
    """Text between examples under `system` and `text`."""

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if "{prompt}" not in self.question:
            raise ValueError("question has no {prompt}, the place of the prompt")
        return self


class RolloutDemonstrationsSection(SelectionSection):
    """Demonstrations before every sampled prompt, never the prompt itself or its text."""

    renamed_values: ClassVar = {"train_with": {"in_context": "with_demonstrations", "bare": "without_demonstrations"}}

    count: int = Field(4, ge=1)
    """Demonstrations per prompt. Those that exceed the prompt's token budget are dropped from the far end and counted."""
    pool: DatasetSection | None = None
    """Dataset of the demonstrations: rows with a prompt and an answer. Default: `data.train`."""
    answer_field: str = "completion"
    """Column of the pool with the answer, as text."""
    context: ContextSection = ContextSection()
    """Layout; must be `text` if `data.chat` is false."""
    train_with: Literal["with_demonstrations", "without_demonstrations"] = "with_demonstrations"
    """Prompt that policy, reference and critic read, and that evaluations use.

    `with_demonstrations`: the same prompt as the rollout engine. `without_demonstrations`: only the plain prompt. The engine's
    log-probs then have another context, so `mismatch_alarm` is off, `algorithm.off_policy_correction` must be off, and old
    log-probs are the trainer's. In both cases rewards judge the response to the plain prompt.
    """


class EnvironmentSection(Section):
    """Environment or agent of multi-turn responses.

    All turns of a sample, with the observations between them, are one response of at most `rollout.max_new_tokens` tokens.
    """

    name: str
    """Environment: `calculator`, `guessing`, `gym`, `module:Class` or `path/to/file.py:Class`. Or an agent, which calls the
    policy by HTTP: `program`, `tools`, `mcp`, `module:function` or `path/to/file.py:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, which is constructed for each sample, or of the agent's function."""
    max_turns: int = Field(8, ge=1)
    """Maximum turns of the policy. A sample that is not done by then counts as truncated. Further requests of an agent are
    refused."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of a turn; the environment receives the truncated turn. Default: the remaining tokens of the response."""
    max_sampled_tokens: int | None = Field(None, ge=1)
    """Maximum sampled tokens of an agent's sample, over all of its conversations; further requests are refused. Default: only
    the limit of `rollout.max_new_tokens` per conversation."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Maximum seconds of one environment step, or between two requests of an agent."""
    retries: int = Field(1, ge=0)
    """Retries of a sample whose environment failed or timed out. Each restarts the sample with the same seeds."""
    max_failed_share: float = Field(0.1, ge=0, lt=1)
    """Maximum share of failed samples in a step, after retries. They are left out; above this share the run stops."""
    failed_floor: int = Field(2, ge=0)
    """Number of failed samples in a step that never stop the run, even above `max_failed_share`, unless all samples failed."""
    credit: Literal["turn", "episode"] = "turn"
    """Position of the environment's rewards. `turn`: each at the last token of its turn. `episode`: their sum at the end."""
    votes: Literal["sample", "segment"] = "sample"
    """Votes in the baselines of group estimators (GRPO, RLOO, ...). `sample`: one vote per sample, shared by the segments of
    an agent's sample, so that a sample with many branches does not outweigh the others. `segment`: one vote per segment."""
    template: str = "{observation}"
    """Text around an observation in the response; for chat models it has the end of one turn and the start of the next. No
    effect on agents, whose messages use the chat template."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template.count("{observation}") != 1:
            raise ValueError("template: expected {observation} exactly once, the place of the observation")
        return self


BACKENDS = ("vllm", "transformers")
"""Built-in rollout engines."""


def _check_backend(backend: str) -> str:
    if backend not in BACKENDS and ":" not in backend:
        raise ValueError(
            f"{backend!r} is no rollout engine{did_you_mean(backend, BACKENDS)}; expected {', '.join(BACKENDS)}, "
            "module:Class or path/to/file.py:Class"
        )
    return backend


Backend = Annotated[str, AfterValidator(_check_backend)]
"""Name of a rollout engine, or the path of a class."""


class RolloutSection(Section):
    """Sampling on the rollout replicas.

    A step samples `prompts_per_step` x `samples_per_prompt` responses.
    """

    backend: Backend = "vllm"
    """Rollout engine: `vllm`, `transformers` (needs no vLLM and is slow), `module:Class` or `path/to/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the engine's class."""
    replicas: int = Field(1, ge=1)
    """Rollout replicas: copies of the policy that sample."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices per replica, or per stage of `pipeline_parallel_size` (tensor parallelism), all on one node. Each gets a worker
    process of vLLM, on CPUs too. Must divide the model's attention heads; needs `backend: vllm`."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Stages per replica (pipeline parallelism). Each stage holds its part of the layers on `tensor_parallel_size` devices. A
    replica that does not fit one node is spread over several nodes, with the same number of stages on each. At most the number
    of layers; needs `backend: vllm`. Adapters are then served merged. Not run on GPUs."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts per step."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses per prompt: the size of a group."""
    refill_rounds: int = Field(0, ge=0)
    """Maximum rounds of dynamic sampling per step (DAPO): prompts whose responses all have the same score are replaced by
    others. If some are left after the last round, they fill the step. 0 keeps every prompt."""
    overissue: float = Field(0.0, ge=0, le=10)
    """Extra prompts that the built-in step samples, as a share of `prompts_per_step`. The step trains on the groups that
    finish first and cancels the others, so it does not wait for the longest responses. This biases training towards short
    responses: prompts with long responses are trained on less often, and right answers that need many tokens are lost.
    Canceled prompts count as used. 0 waits for all."""
    demonstrations: RolloutDemonstrationsSection | None = None
    """Examples before every prompt. Default: none."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum tokens of a response."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling and of all log-probs. There is no top-p or top-k: rollout engine and trainer would disagree."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response. The text is kept up to and including the token that completes the string."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if text.strip("<>|/[]").lower() in ("eos", "eos_token"):
                raise ValueError(
                    f"{text!r} names the end-of-sequence token, which always ends a response: remove it; expected strings of "
                    "the text. The penalty for a response without that token is algorithm.shaping.missing_eos_penalty"
                )
        return stop

    tool_parser: str = "auto"
    """vLLM's parser of tool calls for agents, such as `hermes`. `auto` chooses by the chat template."""
    reasoning_parser: str = "auto"
    """vLLM's parser of reasoning for agents, such as `qwen3`. `auto` chooses by the chat template; `none` leaves reasoning in
    the text."""
    max_model_length: int | None = Field(None, ge=2)
    """Maximum tokens of prompt and response together. Default: the model's context."""
    max_concurrent: int = Field(256, ge=1)
    """Maximum requests that a replica decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Maximum KV cache of a replica on a CPU, in GiB. It is smaller if `max_concurrent` full-length responses need less."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of GPU memory that a replica may use."""
    sleep: bool = False
    """Release the GPU memory of weights and KV cache while models train on the same devices. The next weight sync restores the
    weights, then the cache. Needs `backend: vllm`. On a CPU nothing is freed."""
    weight_transfer: Literal["auto", "shared_memory", "nccl", "ipc"] = "auto"
    """Transport of a weight sync. `shared_memory` works everywhere. `nccl` and `ipc` are vLLM's transfers from GPU to GPU and
    need `backend: vllm`: `nccl` to other GPUs (`placement.mode: disaggregated`), `ipc` on the policy's GPUs (`colocated`).
    `auto` is `ipc` where each replica shares the GPU of a policy rank, `nccl` where replicas have GPUs of their own, and
    `shared_memory` elsewhere, such as on CPUs. Neither `nccl` nor `ipc` has been run on a GPU yet."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """How the engine serves LoRA adapters (`model.lora`). `adapter`: unmerged, by vLLM's own LoRA layers; a weight sync
    carries the adapter only. `merged`: base + adapter in the engine's precision. In bfloat16 most of a small update is then
    lost to rounding. In float32 nothing is lost, and a CPU samples about twice as fast. `auto` is `merged` for a policy that
    computes in float32 on a CPU and with other backends than vLLM, else `adapter`. Not measured on GPUs."""
    routing_replay: Literal["off", "rollout", "old"] = "off"
    """Choice of experts in training, for `qwen3_moe` and `mixtral` policies. `off`: the trained model's own choice. `rollout`
    (R3): the choice of the rollout engine for each token, in old log-probs and updates; tokens that its prefix cache held have
    the trained model's own choice. `old` (R2 of verl): the trained model's choice for its old log-probs, in all updates of the
    step; needs `algorithm.old_logprobs: recomputed`. Then no prefixes are shared and no frozen layers are cached. Not together
    with `algorithm.online_dpo`, `observe.record`, and sequence or tensor parallelism of the policy; `rollout` neither with
    `environment`, `train_with: without_demonstrations`, engines by path, or tensor or pipeline parallelism of the replicas. On
    GPUs vLLM's own `enable_return_routed_experts` is used, which has not been run."""
    mismatch_alarm: float = Field(0.5, gt=0)
    """Maximum mean |trainer log-prob - rollout log-prob| of a step, in nats per token; above it the run stops. Only tokens
    sampled with the newest weights count, because older ones (`async.max_staleness`) differ by the updates since."""

    @property
    def devices(self) -> int:
        """Devices of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def issued_prompts(self) -> int:
        """Prompts of a step, those of `overissue` included."""
        return math.ceil(self.prompts_per_step * (1 + self.overissue) - 1e-9)  # 50 * 1.1 is 55, not 55.00000000000001

    @property
    def replays_routing(self) -> bool:
        """True if the policy is trained with experts that were chosen before."""
        return self.routing_replay != "off"

    @property
    def captures_routing(self) -> bool:
        """True if rollout engines return the experts that they chose."""
        return self.routing_replay == "rollout"
