"""The steps that are on their way: their prompts are out and their responses are being sampled.

Without `async.max_staleness` that is the step at hand. With it, later steps are issued as soon as `capacity` lets them, and
their responses are sampled while the policy trains. What is outstanding stands in the sampler's books, in the order of its
steps: after a loss or a resume the same prompts are issued again for the same steps, and so with the same seeds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, RolloutRequest
from rayrlhf.ppo.generation import Generation, GenerationBatch
from rayrlhf.ppo.staleness import capacity


class Issued(NamedTuple):
    """What was issued for a step."""

    prompts: list[Prompt]
    batch: GenerationBatch


class Pipeline:
    """Issues steps in their order.

    Args:
        config: of the run.
        sampler: the training prompts.
        generation: samples.
        requests: the requests of (prompts, samples a prompt, step).
    """

    def __init__(
        self,
        config: PPOConfig,
        sampler: PromptSampler,
        generation: Generation,
        requests: Callable[[Sequence[Prompt], int, int], list[RolloutRequest]],
    ) -> None:
        self._config = config
        self._sampler = sampler
        self._generation = generation
        self._requests = requests
        self._issued: dict[int, Issued] = {}

    def take(self, step: int) -> Issued:
        """What was issued for a step, which is the one at hand; the steps that may be sampled meanwhile are issued first."""
        rollout, size = self._config.rollout, self._config.samples_per_step
        room = capacity(
            step, size * (step + len(self._issued)), size, self._config.asynchronous.max_staleness, self._config.run.steps
        )
        for _ in range(room // size):
            ahead = step + len(self._issued)
            prompts = self._sampler.next(rollout.prompts_per_step)
            requests = self._requests(prompts, rollout.samples_per_prompt, ahead)
            self._issued[ahead] = Issued(prompts, self._generation.add(requests, rollout.temperature))
        return self._issued.pop(step)

    def reset(self) -> None:
        """Forget everything that is on its way, here and on the replicas."""
        self._issued.clear()
        self._generation.reset()
