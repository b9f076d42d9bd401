"""Batch generation: responses of a rollout engine to the rows of a part.

A part is generated as one batch that starts from an empty engine, and every request has a seed made of (run, pass, row,
sample). A part that is generated again after a crash submits the same requests in the same batch and gets the same bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.actors.local_machine import check_local_machine
from rayrlhf.batch_inference.part_pipeline import Pool
from rayrlhf.batch_inference.source import replace_surrogates
from rayrlhf.batch_inference.stage_resources import StageResources
from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.batch_inference import GenerateSection, PairsSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec, rollout_environment
from rayrlhf.engines.rollout.factory import build_rollout_engine, check_rollout_backend
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.cuda import check_vllm_device


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Model, limits and sampling parameters of a pass; small and picklable.

    Attributes:
        label: the model's name in tables, independent of the run folder's path.
        model: the model that generates.
        data: how prompts become tokens.
        step: index of the pass over the data; no two passes share seeds.
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
        return _rollout_section(self.generate)


def check_generator(generate: GenerateSection, address: str | None = None, models: Iterable[ModelSection] = ()) -> None:
    """Check the rollout engine before anything starts.

    Args:
        address: that of Ray.
        models: the models that generate.

    Raises:
        UserError: `generate.backend` is not installed, cannot be resolved or lacks a method, its arguments do not fit, a
            model's files are not whole, the tensor-parallel size does not divide its attention heads, or vLLM is the build for
            GPUs and this machine, where it would run, has none.
    """
    from rayrlhf.models.start_check import check_generating_model

    check_rollout_backend(_rollout_section(generate), "generate.backend")
    for model in models:
        check_generating_model(model, generate.backend, generate.tensor_parallel_size, "generate")
    if generate.backend == "vllm":
        check_local_machine(address, lambda _: check_vllm_device("generate.backend"))


def _rollout_section(generate: GenerateSection) -> RolloutSection:
    return RolloutSection(**{name: getattr(generate, name) for name in GenerateSection.model_fields})


def generator_pool(
    name: str, worker: type, plan: GenerationPlan, resources: StageResources, arguments: tuple[Any, ...] = ()
) -> Pool:
    """Return a pool of rollout engines; workers get the plan, then `arguments`."""
    environment = rollout_environment(plan.rollout(), threads=resources.generator_threads)
    size, cpus, gpus = resources.generators, resources.generator_cpus, resources.generator_gpus
    return Pool(name, worker, (plan, *arguments), size, cpus, gpus, environment)


@dataclass(frozen=True, slots=True)
class Response:
    """A response: text, finish reason ("stop" or "length") and number of tokens."""

    text: str
    finish_reason: str
    tokens: int


class BatchGenerator:
    """A rollout engine that generates responses to rows."""

    def __init__(self, plan: GenerationPlan) -> None:
        """Start the engine.

        Raises:
            UserError: the backend or the model is unusable.
        """
        self._plan = plan
        self._engine: RolloutEngine = build_rollout_engine(RolloutSpec(plan.model, plan.rollout(), plan.seed, logprobs=False))
        self._tokenizer: Tokenizer = load_tokenizer(plan.model)

    def generate(self, rows: Sequence[dict[str, Any]]) -> list[list[Response]]:
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
    return Response(replace_surrogates(rollout.text), rollout.finish_reason, len(rollout.response_ids))
