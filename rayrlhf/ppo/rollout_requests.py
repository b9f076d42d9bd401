"""Rollout requests of a step: one per prompt and sample."""

from collections.abc import Sequence
from dataclasses import replace

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed

GREEDY_SAMPLE = 2**20
"""Sample number of a greedy response. No sampled response has it, so a late one cannot be mistaken for it."""


class RequestBuilder:
    """Builds the requests of a run.

    Args:
        config: its `run.seed` seeds every request; with an `environment` each request carries its whole prompt.
    """

    def __init__(self, config: PPOConfig) -> None:
        self._config = config

    def build(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, step: int, numbers: dict[int, int] | None = None
    ) -> list[RolloutRequest]:
        """Return the requests of some prompts; arguments as for `make_requests`."""
        requests = make_requests(prompts, samples_per_prompt, step, self._config.run.seed, numbers)
        if self._config.environment is None:
            return requests
        by_id = {prompt.id: prompt for prompt in prompts}
        return [replace(request, prompt=by_id[request.key.prompt]) for request in requests]


def make_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, step: int, run_seed: int, numbers: dict[int, int] | None = None
) -> list[RolloutRequest]:
    """Return one request per (prompt, sample).

    A prompt that occurs twice in a step continues the sample numbers of its group.

    Args:
        prompts: in the order of the stream.
        numbers: prompt id -> its next free sample number. Updated in place, for a step that samples in several calls.
    """
    numbers = {} if numbers is None else numbers
    requests = []
    for prompt in prompts:
        first = numbers.get(prompt.id, 0)
        numbers[prompt.id] = first + samples_per_prompt
        token_ids = prompt.token_ids if prompt.context_ids is None else prompt.context_ids
        for sample in range(first, first + samples_per_prompt):
            seed = sample_seed(run_seed, step, prompt.id, sample)
            requests.append(RolloutRequest(SampleKey(step, prompt.id, sample), token_ids, seed))
    return requests
