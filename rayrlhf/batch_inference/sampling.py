"""Responses of a rollout engine to the rows of one part: the stage that costs the time.

A part is sampled as one batch that starts from an empty engine, and every request has a seed made of (run, pass, row, sample):
a part that is made again after a crash asks for the same things in the same company, and gets the same bytes.

What is sampled, in words that travel: small, picklable, and free of the libraries that do it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.batch_inference.source import storable
from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft import GenerateSection, PairsSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.models.load import load_tokenizer


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


class Sampler:
    """A model that answers rows."""

    def __init__(self, plan: SamplingPlan) -> None:
        """Start the engine.

        Raises:
            UserError: backend or model cannot be used.
        """
        self._plan = plan
        self._engine: RolloutEngine = build_rollout_engine(RolloutSpec(plan.model, plan.rollout(), plan.seed, logprobs=False))
        self._tokenizer: Any = load_tokenizer(plan.model)

    def answer(self, rows: Sequence[dict[str, Any]]) -> list[list[Response]]:
        """Return `plan.samples` responses for each row of a part, in order."""
        prompts = encode_prompts(
            self._tokenizer,
            self._plan.data,
            [row["prompt"] for row in rows],
            [row["messages"] for row in rows],
            [row["source"] for row in rows],
        )
        requests = self._requests([row["row"] for row in rows], prompts)
        finished: dict[SampleKey, Rollout] = {}
        if requests:
            limit = self._plan.generate.max_new_tokens
            self._engine.submit(requests, temperature=self._plan.temperature, max_new_tokens=limit)
        while self._engine.unfinished:
            finished |= {rollout.key: rollout for rollout in self._engine.poll(self._engine.unfinished)}
        samples = range(self._plan.samples)
        keys = [[SampleKey(self._plan.step, row["row"], sample) for sample in samples] for row in rows]
        return [[_response(finished[key]) for key in group] for group in keys]

    def _requests(self, rows: Sequence[int], prompts: Sequence[Int32]) -> list[RolloutRequest]:
        plan = self._plan
        return [
            RolloutRequest(SampleKey(plan.step, row, sample), ids, sample_seed(plan.seed, plan.step, row, sample))
            for row, ids in zip(rows, prompts, strict=True)
            for sample in range(plan.samples)
        ]


def _response(rollout: Rollout) -> Response:
    return Response(storable(rollout.text), rollout.finish_reason, len(rollout.response_ids))
