"""Sections that batch inference over a dataset reads: the rows, the rollout engine, and the processes of the stages."""

from typing import Literal

from pydantic import Field

from rayrlhf.config.section import Section


class GenerateSection(Section):
    """The sampler behind probes and new responses."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """What samples; `transformers` needs no vLLM."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response."""
    max_model_length: int | None = Field(None, ge=2)
    """Longest prompt + response in tokens, for the dataset and for sampling; the model's context when not given."""
    max_concurrent: int = Field(256, ge=1)
    """Most requests one generator decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Most KV cache of a generator on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of the device a generator may use on a GPU."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model."""


class PipelineSection(Section):
    """Processes of the streaming stages, and how work is cut."""

    rows_per_part: int = Field(1024, ge=1)
    """Rows of one part file: what a generator samples as one batch, and the most that a crash makes it do again. 1 makes every
    row a checkpoint of its own, at the price of sampling one at a time."""
    generators: int = Field(1, ge=1)
    """Processes that sample; as many as fit when not given."""
    generator_cpus: float | None = Field(None, gt=0)
    """Per generator; an equal share of what the other stages leave, when not given."""
    generator_gpus: float | None = Field(None, ge=0)
    """Per generator; all GPUs of its tensor-parallel group, or 0 on a machine without, when not given."""
    generator_threads: int | None = Field(None, ge=1)
    """OpenMP threads per generator; its share of the machine's CPUs when not given."""
    scorers: int | None = Field(None, ge=1)
    """Processes that compute BLEU; half the CPUs beside generators, all of them when nothing is generated, when not given."""
    max_restarts: int = Field(5, ge=0)
    """How often a generator or scorer that died is started again before the run gives up."""
    stall_seconds: float = Field(1800.0, gt=0)
    """Give up when no stage makes progress for so long."""
    address: str | None = None
    """Ray address; a job's own cluster, or a new local one, when not given."""


class PairsSection(Section):
    """The dataset to repair: JSONL, Parquet, a built-in (`builtin:word-problems`), or a hub name."""

    path: str
    """Also a folder in the hub's layout, or one that `save_to_disk` of the `datasets` package wrote."""
    split: str = "train"
    """Of a hub or built-in dataset."""
    subset: str | None = None
    """Configuration name of a hub dataset (`main` for `openai/gsm8k`)."""
    prompt_field: str = "prompt"
    """Text, or a list of {role, content} messages."""
    response_field: str = "completion"
    """Text, or a list with one assistant message."""
    chat: bool = True
    """Put a text prompt into the chat template as one user turn; a conversational prompt always goes through it."""
    system_prompt: str | None = None
    """First message of every conversation that does not bring a system message of its own."""
    limit: int | None = Field(None, ge=1)
    """Use only the first n rows."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Stop before anything is generated when more than this share of the rows is unusable."""
