"""Collects rollouts and scores: streamed, refilled, or with rewards alone."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.fault_tolerance import FaultTolerance
from rayrlhf.actors.placement import ForwardRole, Role
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.environments.episodes import episode_metrics, with_extra_segments, without_failed
from rayrlhf.models.network_io import OutputName
from rayrlhf.observe.metric_names import OVERISSUED_TOKENS, SAMPLED_TOKENS
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.generation import Generation, GenerationBatch
from rayrlhf.ppo.group_filter import GroupFilter
from rayrlhf.ppo.opponent import with_opponent
from rayrlhf.ppo.reward_rows import RewardRow
from rayrlhf.ppo.sample_ledger import SampleLedger
from rayrlhf.ppo.scoring import REWARD, ForwardPass, ScoredRollouts, Scorer
from rayrlhf.ppo.whole_groups import WholeGroups

GREEDY_SAMPLE = 2**20
"""Sample number of a greedy response. No sampled response has it, so a late one cannot be mistaken for it."""


class RequestBuilder:
    """Builds the requests of a run.

    Args:
        config: its `run.seed` seeds every request; with an `environment` each request carries its whole prompt. Each second
            sample of a training prompt may come from the opponent of `algorithm.online_dpo`.
    """

    def __init__(self, config: PPOConfig) -> None:
        self._config = config

    def build(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, step: int, numbers: dict[int, int] | None = None
    ) -> list[RolloutRequest]:
        """Return the requests of some prompts; arguments as for `make_requests`."""
        requests = make_requests(prompts, samples_per_prompt, step, self._config.run.seed, numbers)
        if samples_per_prompt > 1:  # evaluations have one, which is the policy's
            requests = with_opponent(self._config, requests)
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


class RolloutCollector:
    """Turns requests into rollouts, and rollouts into scored rollouts.

    Args:
        fault_tolerance: replaces lost reward, reference and teacher actors.
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

    def stream(self, batch: GenerationBatch, ledger: SampleLedger | None = None) -> Iterator[list[Rollout]]:
        """Yield the rollouts of a batch as they finish, without those whose environment failed.

        `ledger` is that of the step which will train on them.
        """
        finished: Iterator[list[Rollout]] = self._generation.collect(batch)
        environment = self._config.environment
        if ledger is not None:
            ledger.issue(batch.requests)
            finished = ledger.sampling(finished)
        return without_failed(finished, len(batch.requests), environment) if environment else finished

    def scorer(self, prompts: Sequence[Prompt], known_rewards: Mapping[SampleKey, RewardRow] | None = None) -> Scorer:
        """Return a scorer of every model that reads the rollouts of these prompts."""
        config, actor_groups = self._config, self._actor_groups
        return Scorer(
            actor_groups,
            self._fault_tolerance.restarter,
            forward_passes(config, actor_groups.sharing, has_critic="critic" in actor_groups),
            {prompt.id: prompt for prompt in prompts},
            actor_groups.plan.overlap,
            config.deadlines.score,
            self._timer,
            known_rewards,
            self._generation.meanwhile,
            REWARD in actor_groups.sharing,
            self._compares,
        )

    @property
    def _compares(self) -> bool:
        judge = self._config.reward.judge
        return judge is not None and judge.mode != "pointwise"

    def with_rewards_only(
        self, prompts: Sequence[Prompt], requests: list[RolloutRequest], temperature: float, ledger: SampleLedger | None = None
    ) -> ScoredRollouts:
        """Sample requests and compute their rewards alone; with a `ledger` extra segments are kept."""
        with self._timer.phase("generate"):
            batch = self._generation.add(requests, temperature)
            rollouts = [rollout for finished in self.stream(batch, ledger) for rollout in finished]
        by_id, seconds = {prompt.id: prompt for prompt in prompts}, self._config.deadlines.score
        shares, restarter = REWARD in self._actor_groups.sharing, self._fault_tolerance.restarter
        scorer = Scorer(
            *(self._actor_groups, restarter, (), by_id, False, seconds, self._timer),
            reward_shares_prefixes=shares,
            compares=self._compares,
        )
        scorer.add(rollouts if ledger is None else with_extra_segments(rollouts))
        return scorer.finish()

    @property
    def chooses_groups(self) -> bool:
        """True if a step trains on some of the groups that are sampled for it."""
        return bool(self._config.rollout.refill_rounds or self._config.rollout.overissue)

    def chosen(
        self, draw: Callable[[int], list[Prompt]], numbers: dict[int, int], ledger: SampleLedger
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Sample a step by `refill` or `overissue`, whose arguments and result these are."""
        sample = self.refill if self._config.rollout.refill_rounds else self.overissue
        return sample(draw, numbers, ledger)

    def refill(
        self, draw: Callable[[int], list[Prompt]], numbers: dict[int, int], ledger: SampleLedger
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Sample a step and replace its zero-variance groups.

        The models read only the responses that stay.

        Args:
            draw: takes the next prompts from the stream.
            numbers: see `make_requests`.
            ledger: of the step.

        Returns:
            The scored rollouts, and the metrics of the filter.
        """
        rollout = self._config.rollout
        group_filter = GroupFilter(rollout.prompts_per_step, rollout.samples_per_prompt, rollout.refill_rounds)
        prompts: list[Prompt] = []
        rewards: dict[SampleKey, RewardRow] = {}
        while group_filter.missing:
            drawn = draw(group_filter.missing)
            requests = self._requests.build(drawn, rollout.samples_per_prompt, ledger.step, numbers)
            scored = self.with_rewards_only(drawn, requests, rollout.temperature, ledger)
            rewards |= scored.reward_rows()
            group_filter.add(scored.rollouts, {key: row.score for key, row in rewards.items()})
            prompts += drawn
        ledger.leave_out(group_filter.left_out(), "zero_variance")
        scorer = self.scorer(prompts, rewards)
        scorer.add(group_filter.rollouts())
        return scorer.finish(), group_filter.metrics()

    def overissue(
        self, draw: Callable[[int], list[Prompt]], numbers: dict[int, int], ledger: SampleLedger
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Sample more prompts than a step needs, and score the groups that finish first.

        The other groups are canceled. Arguments and result are those of `refill`.
        """
        rollout, environment = self._config.rollout, self._config.environment
        prompts = draw(rollout.issued_prompts)
        scorer, groups = self.scorer(prompts), WholeGroups(rollout.prompts_per_step, rollout.samples_per_prompt)
        with self._timer.phase("generate"):
            requests = self._requests.build(prompts, rollout.samples_per_prompt, ledger.step, numbers)
            batch = self._generation.add(requests, rollout.temperature)
            ledger.issue(requests)
            finished = groups.take(ledger.sampling(self._generation.collect(batch)))
            if environment:
                finished = without_failed(finished, self._config.samples_per_step, environment)
            for whole in finished:
                scorer.add(with_extra_segments(whole))
            tokens = self._generation.reset()
        rest = with_extra_segments(one for one in groups.rest if not one.failure)
        ledger.leave_out(rest, "overissued")
        ledger.cancel("overissued")
        scored = scorer.finish()
        tokens += sum(len(one.response_ids) for one in rest)
        metrics = {
            "sampling/prompts": float(len(prompts)),
            "sampling/prompts_left_out": float(len(prompts) - rollout.prompts_per_step),
            SAMPLED_TOKENS: float(tokens + sum(len(one.response_ids) for one in scored.rollouts)),
            OVERISSUED_TOKENS: float(tokens),
        }
        return scored, metrics | (episode_metrics(scored.rollouts, self._config.samples_per_step) if environment else {})

    def with_greedy(self, scored: ScoredRollouts, step: int) -> ScoredRollouts:
        """Add the reward of a greedy response to each prompt, if the estimator needs it."""
        if not self._config.needs_greedy:
            return scored
        numbers = dict.fromkeys((rollout.key.prompt for rollout in scored.rollouts), GREEDY_SAMPLE)
        prompts = [scored.prompts[prompt] for prompt in numbers]
        return replace(scored, greedy=self.with_rewards_only(prompts, self._requests.build(prompts, 1, step, numbers), 0.0))


def forward_passes(config: PPOConfig, sharing: Collection[Role], *, has_critic: bool) -> list[ForwardPass]:
    """Return the forward passes that a step's objective needs, one per model.

    Roles of `sharing` compute common beginnings once.
    """
    temperature = config.rollout.temperature
    logprobs: frozenset[OutputName] = frozenset({"logprobs"})
    values: frozenset[OutputName] = frozenset({"values"})
    replicate, replicate_critic = (
        config.train.all_ranks_must_forward or ranks.expert_parallel > 1
        for ranks in (config.placement.policy, config.placement.critic)
    )
    policy, critic = config.placement.policy.group, config.placement.critic.group
    passes = []
    if config.needs_reference:
        owner: ForwardRole = "policy" if config.reference_in_policy else "reference"
        own = config.reference_in_policy
        group = policy if own else 1
        passes.append(ForwardPass("reference", owner, logprobs, temperature, True, own and replicate, group, owner in sharing))
    if config.teacher is not None:
        known: frozenset[OutputName] = logprobs if config.teacher.divergence is None else logprobs | {"hidden"}
        passes.append(ForwardPass("teacher", "teacher", known, temperature, shares_prefixes="teacher" in sharing))
    if has_critic:
        passes.append(ForwardPass("critic", "critic", values, 1.0, False, replicate_critic, critic, "critic" in sharing))
    read = logprobs if config.old_logprobs == "recomputed" else frozenset()
    if config.rollout.routing_replay == "old":
        read |= {"experts"}
    if config.critic.kind == "shared":
        read |= values
    if read:
        passes.append(ForwardPass("policy", "policy", read, temperature, False, replicate, policy, "policy" in sharing))
    return passes
