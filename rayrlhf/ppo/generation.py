"""Sampling responses on the rollout replicas, streamed back as they finish.

Requests go out in one message a replica and come back in batches, because a Ray call per sample would cost more than the
sample's tokens on a small model. All samples of one prompt go to the same replica, where they share its prefix cache.
"""

from collections.abc import Iterator, Sequence

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.waiting import fetch, wait_all, wait_any
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed

MESSAGE_SIZE = 32
"""Fewest finished rollouts worth one Ray message."""


def make_requests(prompts: Sequence[Prompt], samples_per_prompt: int, step: int, run_seed: int) -> list[RolloutRequest]:
    """One request per (prompt, sample). A prompt that occurs again in the step continues the sample numbers of its group."""
    seen: dict[int, int] = {}
    requests = []
    for prompt in prompts:
        first = seen.get(prompt.id, 0)
        seen[prompt.id] = first + samples_per_prompt
        for sample in range(first, first + samples_per_prompt):
            seed = sample_seed(run_seed, step, prompt.id, sample)
            requests.append(RolloutRequest(SampleKey(step, prompt.id, sample), prompt.token_ids, seed))
    return requests


def assign(requests: Sequence[RolloutRequest], replicas: int) -> list[list[RolloutRequest]]:
    """Split requests over replicas by prompt, evenly in number; the same requests always split the same way."""
    groups: dict[int, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.key.prompt, []).append(request)
    shares: list[list[RolloutRequest]] = [[] for _ in range(replicas)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares


def generate(
    replicas: ActorGroup, requests: Sequence[RolloutRequest], temperature: float, max_new_tokens: int, seconds: float
) -> Iterator[list[Rollout]]:
    """Sample all requests; yields batches of finished rollouts in the order they finish.

    Raises:
        DeadlineError: a replica did not finish a batch within `seconds`.
        ActorLostError: a replica died.
    """
    shares = assign(requests, len(replicas))
    wait_all(replicas.call_each("submit", [(share, temperature, max_new_tokens) for share in shares]), "submit", seconds)
    handles = dict(zip(replicas.names, replicas.handles, strict=True))
    pending = {
        name: handles[name].poll.remote(MESSAGE_SIZE) for name, share in zip(replicas.names, shares, strict=True) if share
    }
    while pending:
        name = wait_any(pending, "generate", seconds)
        finished, unfinished = fetch(pending.pop(name), "generate", name)
        if unfinished:
            pending[name] = handles[name].poll.remote(MESSAGE_SIZE)
        yield finished
