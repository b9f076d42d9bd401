"""The PPO driver: one loop over sample, score, assemble, update, sync.

The driver holds references, token ids and per-token scalars; weights and logits never pass through it. Its primitives
`generate`, `score` and `step` are public, so that a user can write a loop of their own; `train_step` is the built-in one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.fault_tolerance import FaultTolerance, make_fault_tolerance
from rayrlhf.actors.placement import ForwardRole, TrainRole
from rayrlhf.actors.remote import PendingCalls, put
from rayrlhf.actors.replica_pool import RolloutReplica
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.cross_entropy import CrossEntropyObjective
from rayrlhf.engines.train.plan import UpdateReport
from rayrlhf.environments.episodes import episode_metrics, with_extra_segments, without_failed
from rayrlhf.errors import AlarmError
from rayrlhf.models.load import resolve_dtype
from rayrlhf.models.network import OutputName
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.evaluation import Evaluation
from rayrlhf.ppo.experience import Experience, ExperienceMaker
from rayrlhf.ppo.generation import POLL_SECONDS, Generation, GenerationBatch, make_requests
from rayrlhf.ppo.group_filter import SAMPLED_TOKENS, GroupFilter
from rayrlhf.ppo.scoring import ForwardPass, RewardRow, ScoredRollouts, Scorer
from rayrlhf.ppo.sft_warmup import sft_warmup_plan
from rayrlhf.ppo.step_metrics import fresh_gap, reward_metrics, staleness_metrics, step_metrics
from rayrlhf.ppo.step_pipeline import Pipeline
from rayrlhf.ppo.update_objectives import learning_roles, make_objectives, plan_update
from rayrlhf.weight_sync.driver import SyncReport, make_transfer, put_to_sleep, sync_weights

GREEDY_SAMPLE = 2**20
"""Sample number of a greedy response; a late answer to another request can then not be taken for it."""


class PPOTrainer:
    """Drives the actors of one run.

    Args:
        config: the resolved configuration.
        actor_groups: the running actors.
        sampler: the training prompts.
        evaluation_prompts: the held-out prompts; empty for no evaluation.
        timer: collects the phases of a step.
        callbacks: called in order after each step and evaluation.
        care: what is done about lost processes; without pings when not given.

    Attributes:
        steps_done: PPO steps completed.
        weight_version: version that the replicas serve; 0 is the start weights, which nobody was sent.
        warmed_up: whether the imitation before the first step, if any, is done.
        consistent: False while a step has changed some of the state and not all of it.
    """

    def __init__(
        self,
        config: PPOConfig,
        actor_groups: ActorGroups,
        sampler: PromptSampler,
        evaluation_prompts: Sequence[Prompt] = (),
        timer: PhaseTimer | None = None,
        callbacks: Iterable[Callback] = (),
        fault_tolerance: FaultTolerance | None = None,
    ) -> None:
        self.config = config
        self.actor_groups = actor_groups
        self.sampler = sampler
        self.evaluation_prompts = tuple(evaluation_prompts)
        self.timer = timer or PhaseTimer()
        self.callbacks = list(callbacks)
        self.fault_tolerance = fault_tolerance or make_fault_tolerance(config, actor_groups)
        self.steps_done = 0
        self.weight_version = 0
        self.warmed_up = config.sft_warmup is None
        self.consistent = True
        self._experience = ExperienceMaker(config)
        self._objectives = make_objectives(config)
        ahead = config.asynchronous.max_staleness > 0
        self._generation = Generation(
            self.fault_tolerance.pool,
            self._refresh,
            config.rollout.max_new_tokens,
            config.deadlines.generate,
            sticky=self._exact,
            poll_seconds=POLL_SECONDS if ahead else None,
        )
        self._pipeline = Pipeline(config, sampler, self._generation, self._requests)

    def generate(self, prompts: Sequence[Prompt], *, temperature: float | None = None) -> list[Rollout]:
        """Sample `rollout.samples_per_prompt` responses a prompt, with the current weights, in the order of their keys."""
        requests = self._requests(prompts, self.config.rollout.samples_per_prompt)
        finished = [rollout for batch in self._stream(requests, temperature) for rollout in batch]
        return sorted(finished, key=lambda rollout: rollout.key)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> ScoredRollouts:
        """Rewards, reference log-probs, values and old log-probs of rollouts of these prompts."""
        scorer = self._scorer(prompts)
        scorer.add(with_extra_segments(rollouts))
        return scorer.finish()

    def step(self, scored: ScoredRollouts) -> dict[str, float]:
        """One PPO step on scored rollouts: advantages, all epochs of updates, weight sync. Returns the metrics.

        Raises:
            AlarmError: trainer and sampler disagree on the rollouts' log-probs by more than `rollout.mismatch_alarm`, having
                read the same.
        """
        self.consistent = False
        with self.timer.phase("assemble"):
            experience = self._experience.make(scored)
        staleness = staleness_metrics(scored.rollouts, self.weight_version, self.config.asynchronous.max_staleness)
        gap = fresh_gap(experience.batch.arrays["old_logprobs"], scored.rollouts, self.weight_version)
        allowed = self.config.rollout.mismatch_alarm
        if gap is not None and not gap <= allowed and not self.config.trains_without_demonstrations:
            raise AlarmError(
                f"step {self.steps_done}: trainer and sampler log-probs differ by {gap:.3g} nats on average, above the "
                f"{allowed:.3g} of rollout.mismatch_alarm: the rollout engine does not serve the policy's weights"
            )
        if self.config.rollout.sleep:
            with self.timer.phase("sleep"):
                put_to_sleep(self.fault_tolerance.pool, self.config.deadlines.sync)
        reports = self._update(experience)
        with self.timer.phase("weight_sync"):
            sync = self.sync(self.weight_version + 1)
        self.steps_done += 1
        episodes = self.steps_done * self.config.samples_per_step
        metrics = step_metrics(experience, reports, sync, episodes) | staleness | reward_metrics(scored)
        return metrics | self._checksums() if self._exact else metrics

    def train_step(self) -> dict[str, float]:
        """Sample prompts and run one whole PPO step, scoring rollouts as they finish where roles do not share devices."""
        with self.timer.step():
            prompts, scored, sampled = self._sampled()
            if self.config.needs_greedy:
                scored = replace(scored, greedy=self._greedy(scored))
            metrics = self.step(scored) | sampled
            self.sampler.consumed([prompt.id for prompt in prompts])
            self.consistent = True
        self.fault_tolerance.step_completed()
        tokens = sampled.get(SAMPLED_TOKENS, sum(len(rollout.response_ids) for rollout in scored.rollouts))
        metrics |= self.timer.metrics(generated_tokens=int(tokens))
        for callback in self.callbacks:
            callback.on_step_end(self.steps_done, metrics, scored)
        return metrics

    def warm_up(self, batch: TrainingBatch) -> UpdateReport:
        """Imitate given responses before the first step, and bring the replicas up to date."""
        self.consistent = False
        plan = sft_warmup_plan(self.config, len(batch))
        policy = self.actor_groups["policy"]
        pending = policy.update(put(batch), plan, CrossEntropyObjective(self.config.rollout.temperature))
        report = policy.wait(pending, "warm-up", self.config.deadlines.update)[0]
        self.sync(self.weight_version + 1)
        self.warmed_up = self.consistent = True
        return report

    def evaluate(self) -> Evaluation:
        """Answer and score the held-out prompts, one response each at `evaluation.temperature`."""
        requests = self._requests(self.evaluation_prompts, 1, 0)
        scored = self._rewarded(self.evaluation_prompts, requests, self.config.evaluation.temperature)
        prompts = tuple(scored.prompts[rollout.key.prompt] for rollout in scored.rollouts)
        evaluation = Evaluation(self.steps_done, prompts, scored.rollouts, scored.rewards)
        for callback in self.callbacks:
            callback.on_evaluation(self.steps_done, evaluation)
        return evaluation

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (adapters merged) that transformers and vLLM load unchanged."""
        policy = self.actor_groups["policy"]
        policy.wait(policy.export(folder.absolute()), "export", self.config.deadlines.update)

    @property
    def sync_dtype(self) -> Literal["float32", "bfloat16"]:
        """Data type in which weights travel to the replicas: the one they compute in."""
        return "bfloat16" if resolve_dtype(self.config.model.dtype) == torch.bfloat16 else "float32"

    def state(self) -> dict[str, Any]:
        """The driver's part of a checkpoint."""
        return {
            "step": self.steps_done,
            "weight_version": self.weight_version,
            "warmed_up": self.warmed_up,
            "sampler": self.sampler.state_dict(),
            "experience": self._experience.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the replicas get the policy's weights before they sample.

        Responses that were on their way are forgotten: their prompts are out in the sampler's books, and come again.
        """
        self._pipeline.reset()
        self.steps_done = state["step"]
        self.warmed_up = state["warmed_up"]
        self.sampler.load_state_dict(state["sampler"])
        self._experience.load_state_dict(state["experience"])
        self.sync(state["weight_version"])
        self.consistent = True

    def sync(self, version: int) -> SyncReport:
        """Bring every replica that is there to the policy's weights; one that is being rebuilt gets them later."""
        pool = self.fault_tolerance.pool
        pool.poll_rebuilds()
        if self.config.asynchronous.on_update == "cut":
            self._generation.cut()
        self.weight_version = version
        return self._send_weights([*pool.serving, *pool.stale])

    @property
    def _exact(self) -> bool:
        return self.config.run.determinism == "exact"

    def _send_weights(self, replicas: Sequence[RolloutReplica]) -> SyncReport:
        transfer = make_transfer(self.config.rollout, self.sync_dtype, self.config.deadlines.sync)
        policy, pool = self.actor_groups["policy"], self.fault_tolerance.pool
        return sync_weights(policy, pool, replicas, self.weight_version, transfer)

    def _refresh(self, replicas: Sequence[RolloutReplica]) -> None:
        """Bring rebuilt replicas up to date; before the first sync they are so by themselves."""
        if self.weight_version:
            self._send_weights(replicas)
        else:
            for replica in replicas:
                self.fault_tolerance.pool.synced(replica)

    def _stream(self, requests: list[RolloutRequest], temperature: float | None) -> Iterator[list[Rollout]]:
        wanted = self.config.rollout.temperature if temperature is None else temperature
        return self._collect(self._generation.add(requests, wanted))

    def _collect(self, generation_batch: GenerationBatch) -> Iterator[list[Rollout]]:
        finished = self._generation.collect(generation_batch)
        environment = self.config.environment
        return (
            without_failed(finished, len(generation_batch.requests), environment.max_failed_share) if environment else finished
        )

    def _requests(
        self, prompts: Sequence[Prompt], samples: int, step: int | None = None, seen: dict[int, int] | None = None
    ) -> list[RolloutRequest]:
        """`make_requests` of a step, this one when not given; an environment gets to see the prompts."""
        step = self.steps_done if step is None else step
        requests = make_requests(prompts, samples, step, self.config.run.seed, seen)
        if self.config.environment is None:
            return requests
        by_id = {prompt.id: prompt for prompt in prompts}
        return [replace(request, prompt=by_id[request.key.prompt]) for request in requests]

    def _checksums(self) -> dict[str, float]:
        """A checksum of every learning role's weights, so that two runs can be told apart by one bit."""
        checksums = {}
        for role in self._objectives:
            group = self.actor_groups[role]
            value = group.wait(group.checksum(), "checksum", self.config.deadlines.update)[0]
            checksums[f"{role}/weights_checksum"] = float(value)
        return checksums

    def _sampled(self) -> tuple[list[Prompt], ScoredRollouts, dict[str, float]]:
        """The prompts that a step took from the stream, its scored rollouts, and metrics of the sampling."""
        config = self.config.rollout
        if config.refill_rounds:
            return self._refilled()
        prompts, generation_batch = self._pipeline.take(self.steps_done)
        scorer = self._scorer(prompts)
        with self.timer.phase("generate"):
            for finished in self._collect(generation_batch):
                scorer.add(with_extra_segments(finished))
        scored = scorer.finish()
        return (
            prompts,
            scored,
            episode_metrics(scored.rollouts, len(generation_batch.requests)) if self.config.environment else {},
        )

    def _refilled(self) -> tuple[list[Prompt], ScoredRollouts, dict[str, float]]:
        """As `_sampled`, with prompts that teach nothing replaced; models read only the responses that are kept."""
        config, seen = self.config.rollout, dict[int, int]()
        group_filter = GroupFilter(config.prompts_per_step, config.samples_per_prompt, config.refill_rounds)
        prompts: list[Prompt] = []
        rewards: dict[SampleKey, RewardRow] = {}
        while group_filter.missing:
            drawn = self.sampler.next(group_filter.missing)
            requests = self._requests(drawn, config.samples_per_prompt, seen=seen)
            judged = self._rewarded(drawn, requests, config.temperature, whole=True)
            rewards |= judged.reward_rows()
            group_filter.add(judged.rollouts, {key: row.score for key, row in rewards.items()})
            prompts += drawn
        kept = group_filter.rollouts()
        scorer = self._scorer(prompts, rewards)
        scorer.add(kept)
        return prompts, scorer.finish(), group_filter.metrics()

    def _greedy(self, scored: ScoredRollouts) -> ScoredRollouts:
        """A greedy response to each prompt of these rollouts, under a sample number that no sampled one has."""
        numbers = dict.fromkeys((rollout.key.prompt for rollout in scored.rollouts), GREEDY_SAMPLE)
        prompts = [scored.prompts[prompt] for prompt in numbers]
        return self._rewarded(prompts, self._requests(prompts, 1, seen=numbers), 0.0)

    def _rewarded(
        self, prompts: Sequence[Prompt], requests: list[RolloutRequest], temperature: float, *, whole: bool = False
    ) -> ScoredRollouts:
        """Responses with rewards alone, one a request; the further stretches of each too where they are wanted `whole`."""
        with self.timer.phase("generate"):
            rollouts = [rollout for batch in self._stream(requests, temperature) for rollout in batch]
        by_id = {prompt.id: prompt for prompt in prompts}
        scorer = Scorer(
            self.actor_groups, self.fault_tolerance.restarter, (), by_id, False, self.config.deadlines.score, self.timer
        )
        scorer.add(with_extra_segments(rollouts) if whole else rollouts)
        return scorer.finish()

    def _scorer(self, prompts: Sequence[Prompt], known: Mapping[SampleKey, RewardRow] | None = None) -> Scorer:
        by_id = {prompt.id: prompt for prompt in prompts}
        seconds = self.config.deadlines.score
        overlap = self.actor_groups.plan.overlap
        wait = self._generation.meanwhile
        return Scorer(
            self.actor_groups,
            self.fault_tolerance.restarter,
            self._forward_passes(),
            by_id,
            overlap,
            seconds,
            self.timer,
            known,
            wait,
        )

    def _forward_passes(self) -> list[ForwardPass]:
        """Which models read the rollouts, and what for. Forwards that nothing needs are not among them."""
        config, actor_groups = self.config, self.actor_groups
        temperature = config.rollout.temperature
        logprobs: frozenset[OutputName] = frozenset({"logprobs"})
        values: frozenset[OutputName] = frozenset({"values"})
        replicate = config.train.all_ranks_must_forward
        forward_passes = []
        if config.needs_reference:
            owner: ForwardRole = "policy" if config.reference_in_policy else "reference"
            shared_copy = config.reference_in_policy and replicate
            forward_passes.append(ForwardPass("reference", owner, logprobs, temperature, True, shared_copy))
        if "critic" in actor_groups:
            forward_passes.append(ForwardPass("critic", "critic", values, replicate=replicate))
        own = logprobs | values if config.critic.kind == "shared" else logprobs
        forward_passes.append(ForwardPass("policy", "policy", own, temperature, replicate=replicate))
        return forward_passes

    def _update(self, experience: Experience) -> dict[TrainRole, UpdateReport]:
        """Run the optimizer steps of every learning role: side by side on devices of their own, else in turns."""
        config = self.config
        train = config.train
        plan = plan_update(experience.learnable, train.epochs, config.mini_batch_size, config.run.seed, self.steps_done)
        batch = put(experience.batch)
        lengths = experience.batch.lengths
        tokens = sum(lengths[row] for row in experience.learnable) * train.epochs
        calls: dict[TrainRole, PendingCalls[UpdateReport]] = {}
        reports: dict[TrainRole, UpdateReport] = {}
        overlap = self.actor_groups.plan.overlap
        objectives = learning_roles(self._objectives, config, self.steps_done)
        if overlap:
            calls = {role: self.actor_groups[role].update(batch, plan, goal) for role, goal in objectives.items()}
        for role, objective in objectives.items():
            with self.timer.phase(f"update_{role}", tokens):
                pending = calls[role] if overlap else self.actor_groups[role].update(batch, plan, objective)
                self._generation.meanwhile(pending, config.deadlines.update)
                reports[role] = self.actor_groups[role].wait(pending, f"{role} update", config.deadlines.update)[0]
        return reports
