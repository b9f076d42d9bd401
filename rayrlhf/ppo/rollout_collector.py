"""Collects rollouts and scores: streamed, refilled, or with rewards alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.fault_tolerance import FaultTolerance
from rayrlhf.actors.placement import ForwardRole
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.environments.episodes import with_extra_segments, without_failed
from rayrlhf.models.network import OutputName
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.generation import Generation, GenerationBatch
from rayrlhf.ppo.group_filter import GroupFilter
from rayrlhf.ppo.rollout_requests import GREEDY_SAMPLE, RequestBuilder
from rayrlhf.ppo.scoring import ForwardPass, RewardRow, ScoredRollouts, Scorer


class RolloutCollector:
    """Turns requests into rollouts, and rollouts into scored rollouts.

    Args:
        fault_tolerance: replaces lost reward and reference actors.
        timer: counts generation and each score as a phase.
    """

    def __init__(
        self,
        config: PPOConfig,
        actor_groups: ActorGroups,
        fault_tolerance: FaultTolerance,
        generation: Generation,
        requests: RequestBuilder,
        timer: PhaseTimer,
    ) -> None:
        self._config = config
        self._actor_groups = actor_groups
        self._fault_tolerance = fault_tolerance
        self._generation = generation
        self._requests = requests
        self._timer = timer

    def stream(self, batch: GenerationBatch) -> Iterator[list[Rollout]]:
        """Yield the rollouts of a batch as they finish, without those whose environment failed."""
        finished, environment = self._generation.collect(batch), self._config.environment
        return without_failed(finished, len(batch.requests), environment) if environment else finished

    def scorer(self, prompts: Sequence[Prompt], known_rewards: Mapping[SampleKey, RewardRow] | None = None) -> Scorer:
        """Return a scorer of every model that reads the rollouts of these prompts."""
        config, actor_groups = self._config, self._actor_groups
        return Scorer(
            actor_groups,
            self._fault_tolerance.restarter,
            forward_passes(config, has_critic="critic" in actor_groups),
            {prompt.id: prompt for prompt in prompts},
            actor_groups.plan.overlap,
            config.deadlines.score,
            self._timer,
            known_rewards,
            self._generation.meanwhile,
        )

    def with_rewards_only(
        self, prompts: Sequence[Prompt], requests: list[RolloutRequest], temperature: float, *, segments: bool = False
    ) -> ScoredRollouts:
        """Sample requests and compute their rewards alone; `segments` keeps extra segments."""
        with self._timer.phase("generate"):
            batch = self._generation.add(requests, temperature)
            rollouts = [rollout for finished in self.stream(batch) for rollout in finished]
        by_id, seconds = {prompt.id: prompt for prompt in prompts}, self._config.deadlines.score
        scorer = Scorer(self._actor_groups, self._fault_tolerance.restarter, (), by_id, False, seconds, self._timer)
        scorer.add(with_extra_segments(rollouts) if segments else rollouts)
        return scorer.finish()

    def refill(
        self, draw: Callable[[int], list[Prompt]], step: int, numbers: dict[int, int]
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Sample a step and replace its zero-variance groups.

        The models read only the responses that stay.

        Args:
            draw: takes the next prompts from the stream.
            numbers: see `make_requests`.

        Returns:
            The scored rollouts, and the metrics of the filter.
        """
        rollout = self._config.rollout
        group_filter = GroupFilter(rollout.prompts_per_step, rollout.samples_per_prompt, rollout.refill_rounds)
        prompts: list[Prompt] = []
        rewards: dict[SampleKey, RewardRow] = {}
        while group_filter.missing:
            drawn = draw(group_filter.missing)
            requests = self._requests.build(drawn, rollout.samples_per_prompt, step, numbers)
            scored = self.with_rewards_only(drawn, requests, rollout.temperature, segments=True)
            rewards |= scored.reward_rows()
            group_filter.add(scored.rollouts, {key: row.score for key, row in rewards.items()})
            prompts += drawn
        scorer = self.scorer(prompts, rewards)
        scorer.add(group_filter.rollouts())
        return scorer.finish(), group_filter.metrics()

    def with_greedy(self, scored: ScoredRollouts, step: int) -> ScoredRollouts:
        """Add the reward of a greedy response to each prompt, if the estimator needs it."""
        if not self._config.needs_greedy:
            return scored
        numbers = dict.fromkeys((rollout.key.prompt for rollout in scored.rollouts), GREEDY_SAMPLE)
        prompts = [scored.prompts[prompt] for prompt in numbers]
        return replace(scored, greedy=self.with_rewards_only(prompts, self._requests.build(prompts, 1, step, numbers), 0.0))


def forward_passes(config: PPOConfig, *, has_critic: bool) -> list[ForwardPass]:
    """Return the forward passes that a step's objective needs, one per model."""
    temperature = config.rollout.temperature
    logprobs: frozenset[OutputName] = frozenset({"logprobs"})
    values: frozenset[OutputName] = frozenset({"values"})
    replicate = config.train.all_ranks_must_forward
    policy, critic = config.placement.policy.sequence_parallel, config.placement.critic.sequence_parallel
    passes = []
    if config.needs_reference:
        owner: ForwardRole = "policy" if config.reference_in_policy else "reference"
        own = config.reference_in_policy
        passes.append(ForwardPass("reference", owner, logprobs, temperature, True, own and replicate, policy if own else 1))
    if has_critic:
        passes.append(ForwardPass("critic", "critic", values, replicate=replicate, group=critic))
    read = logprobs if config.old_logprobs == "recomputed" else frozenset()
    if config.critic.kind == "shared":
        read |= values
    if read:
        passes.append(ForwardPass("policy", "policy", read, temperature, replicate=replicate, group=policy))
    return passes
