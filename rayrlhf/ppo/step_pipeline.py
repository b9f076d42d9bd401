"""Steps in progress, whose responses are being sampled. Pure, without Ray.

Without `async.max_staleness` that is the current step. With it, later steps are issued as soon as `capacity` allows, and their
responses are sampled while the policy trains. The prompt sampler keeps outstanding prompts in the order of their steps: after
a loss or a resume the same prompts are issued again for the same steps, and thus with the same seeds.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, RolloutRequest
from rayrlhf.ppo.sample_ledger import SampleLedger

if TYPE_CHECKING:
    from rayrlhf.ppo.generation import Generation, GenerationBatch


def capacity(steps_done: int, issued: int, samples_per_step: int, max_staleness: int, last_step: int) -> int:
    """Return how many more samples may be issued now (AReaL, arXiv 2505.24298).

    A sample belongs to a step from the moment it is issued. Those of step b may be issued once b - n steps are done. Weights
    only get newer afterwards, also for responses that are cut or lost and sampled again. So no token of step b is more than n
    versions old when it trains.

    Args:
        steps_done: PPO steps completed.
        issued: samples issued for all steps so far, those of completed steps included.
        last_step: the run's number of steps. Nothing is sampled for a later step, but a step that begins is always served.
    """
    steps = max(min(steps_done + 1 + max_staleness, last_step), steps_done + 1)
    return max(steps * samples_per_step - issued, 0)


class IssuedStep(NamedTuple):
    """The prompts of a step and the batch of its requests."""

    prompts: list[Prompt]
    batch: "GenerationBatch"


@dataclass
class OpenStep:
    """The step in progress.

    Attributes:
        drawn: ids of the prompts drawn from the stream.
        numbers: prompt id -> its next free sample number.
        requested: responses requested.
        issued: a step issued ahead, until its rollouts are collected.
        metrics: of the group filter.
        ledger: every sample of the step.
        timing: ends the timing of the step.
    """

    drawn: list[int] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    requested: int = 0
    issued: IssuedStep | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    ledger: SampleLedger = field(default_factory=SampleLedger)
    timing: ExitStack | None = None


class StepPipeline:
    """Issues steps in their order.

    Args:
        build_requests: (prompts, samples per prompt, step) -> requests.
    """

    def __init__(
        self,
        config: PPOConfig,
        sampler: PromptSampler,
        generation: "Generation",
        build_requests: Callable[[Sequence[Prompt], int, int], list[RolloutRequest]],
    ) -> None:
        self._config = config
        self._sampler = sampler
        self._generation = generation
        self._build_requests = build_requests
        self._issued: dict[int, IssuedStep] = {}

    def pop(self, step: int) -> IssuedStep:
        """Issue all steps that may be sampled now, and return the current one."""
        rollout, size = self._config.rollout, self._config.samples_per_step
        free = capacity(
            step, size * (step + len(self._issued)), size, self._config.asynchronous.max_staleness, self._config.run.steps
        )
        for _ in range(free // size):
            ahead = step + len(self._issued)
            prompts = self._sampler.next(rollout.prompts_per_step)
            requests = self._build_requests(prompts, rollout.samples_per_prompt, ahead)
            self._issued[ahead] = IssuedStep(prompts, self._generation.add(requests, rollout.temperature))
        return self._issued.pop(step)

    def reset(self) -> None:
        """Forget all steps in progress, here and on the replicas."""
        self._issued.clear()
        self._generation.reset()
