"""What is sampled, in words that travel: small, picklable, and free of the libraries that do it."""

from dataclasses import dataclass

from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft import PairsSection
from rayrlhf.config.presft_pipeline import GenerateSection
from rayrlhf.config.rollout import RolloutSection


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What is sampled for each row: small and picklable, equal in every process.

    Attributes:
        label: the model's name in tables, the same wherever the run folder lies.
        model: the sampled model.
        generate: backend and limits.
        data: how prompts become tokens.
        seed: of the run.
        step: number of the pass over the data, so that no two passes share seeds.
        samples: responses per row.
        temperature: 0 is greedy.
    """

    label: str
    model: ModelSection
    generate: GenerateSection
    data: PairsSection
    seed: int
    step: int
    samples: int
    temperature: float

    def rollout(self) -> RolloutSection:
        """Return the settings of a rollout engine."""
        names = (
            "backend", "max_new_tokens", "stop", "max_model_length", "max_concurrent", "memory_gib", "gpu_memory_utilization",
            "tensor_parallel_size",
        )  # fmt: skip
        return RolloutSection(**{name: getattr(self.generate, name) for name in names})


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response: its text, "stop" or "length", and how many tokens it took."""

    text: str
    finish_reason: str
    tokens: int
