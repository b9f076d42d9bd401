"""Sections of batch inference: the rows, the rollout engine, and the processes of the stages."""

from typing import Any

from pydantic import Field

from rayrlhf.config.data import SourceSection
from rayrlhf.config.rollout import Backend
from rayrlhf.config.section import Section


class GenerateSection(Section):
    """Rollout engine of batch generation."""

    backend: Backend = "vllm"
    """Rollout engine: `vllm`, `transformers` (needs no vLLM), `module:Class` or `path/to/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the engine's class."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum tokens of a response."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response."""
    max_model_length: int | None = Field(None, ge=2)
    """Maximum tokens of prompt and response, for the dataset and for generation. Default: the model's context."""
    max_concurrent: int = Field(256, ge=1)
    """Maximum requests that a generator decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Maximum KV cache of a generator on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of GPU memory that a generator may use."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per generator, which share one copy of the model."""


class PartsSection(Section):
    """Size of the parts of a dataset, and failures of the processes that compute them."""

    rows_per_part: int = Field(1024, ge=1)
    """Rows per part file: the batch size of a process, and the maximum work that a crash repeats. 1 makes every row a
    checkpoint, but rows are then processed one at a time."""
    max_restarts: int = Field(5, ge=0)
    """Restarts of a process before the run fails."""
    stall_seconds: float = Field(1800.0, gt=0)
    """Seconds without progress after which the run fails."""
    address: str | None = None
    """Ray address. Default: the cluster of the job, or a new local one."""


class PipelineSection(PartsSection):
    """Processes of the streaming stages, and size of their parts."""

    generators: int = Field(1, ge=1)
    """Generator processes."""
    generator_cpus: float | None = Field(None, gt=0)
    """CPUs per generator. Default: an equal share of the CPUs that other stages leave."""
    generator_gpus: float | None = Field(None, ge=0)
    """GPUs per generator. Default: those of its tensor-parallel group, or 0 without GPUs."""
    generator_threads: int | None = Field(None, ge=1)
    """OpenMP threads per generator. Default: its share of the CPUs."""
    scorers: int | None = Field(None, ge=1)
    """Scorer processes. Default: half of the CPUs that generators leave, or all CPUs if nothing is generated."""


class PairsSection(SourceSection):
    """Pairs of prompt and response: files, a folder, a built-in (`builtin:word-problems`), or a hub name."""

    prompt_field: str = "prompt"
    """Text, or a list of {role, content} messages."""
    response_field: str = "completion"
    """Text, or a list with one assistant message."""
    chat: bool = True
    """Wrap a text prompt in the chat template as one user turn. A conversational prompt always uses the template."""
    system_prompt: str | None = None
    """First message of every conversation without a system message."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Maximum share of unusable rows; above it the run fails before generation."""
