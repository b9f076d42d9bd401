"""One PPO step on running actors: prompts, generate, score, update, sync.

The driver holds references, token ids and per-token scalars; weights and logits never pass through it. `train_step` is the
built-in step; it is made of the same primitives that `PPOTrainer` offers to other loops.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.fault_tolerance import FaultTolerance, make_fault_tolerance
from rayrlhf.actors.replica_pool import RolloutReplica
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train.plan import UpdateReport
from rayrlhf.environments.episodes import episode_metrics, with_extra_segments
from rayrlhf.errors import UserError
from rayrlhf.observe.metric_names import CHECKSUMS, LOGPROB_GAP, RECORD, SAMPLED_TOKENS, STUDENT_STEP, UPDATE_ARRIVED
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.evaluation import Evaluation, OwnReward
from rayrlhf.ppo.executed_step import ExecutedStep, StepObserver, Weights
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.generation import POLL_SECONDS, Generation
from rayrlhf.ppo.given_responses import GivenResponses, is_given_step
from rayrlhf.ppo.model_updater import ModelUpdater, checksum_metrics, step_plan
from rayrlhf.ppo.opponent import own_rows
from rayrlhf.ppo.rollout_collector import RequestBuilder, RolloutCollector
from rayrlhf.ppo.scoring import OwnRewards, ScoredRollouts
from rayrlhf.ppo.step_metrics import cache_metrics, check_gap, fresh_gap, reward_metrics, staleness_metrics, step_metrics
from rayrlhf.ppo.step_pipeline import OpenStep, StepPipeline
from rayrlhf.ppo.stream_witness import StreamWitness
from rayrlhf.weight_sync.buckets import SyncDtype
from rayrlhf.weight_sync.driver import SyncReport, make_transfer, put_to_sleep, sync_weights


class StepDriver:
    """Drives the actors of one run through its steps.

    Args:
        config: the resolved configuration.
        actor_groups: the running actors.
        sampler: the training prompts.
        evaluation_prompts: the held-out prompts; empty for no evaluation.
        timer: collects the phases of a step.
        callbacks: called in order after each step and evaluation.
        fault_tolerance: handles lost processes; without heartbeats when not given.
        observer: receives each step after its update.

    Attributes:
        steps_done: PPO steps completed.
        weight_version: version that the replicas serve; 0 is the start weights, before the first sync.
        warmed_up: True when the SFT warm-up, if any, is done.
        consistent: False while a step has changed part of the state.
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
        observer: StepObserver | None = None,
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
        self._evaluating = False
        self._observer = observer
        self._weights: Weights | None = None
        self._open = OpenStep()
        self._experience = ExperienceMaker(config)
        self._stream_witness = StreamWitness(sampler)
        self._requests = RequestBuilder(config)
        self._given = GivenResponses(config)
        self._generation = Generation(
            self.fault_tolerance.pool,
            self._refresh,
            config.rollout.max_new_tokens,
            config.deadlines.generate,
            sticky=self._exact,
            poll_seconds=POLL_SECONDS if self._ahead or config.rollout.overissue else None,
        )
        self._pipeline = StepPipeline(config, sampler, self._generation, self._requests.build)
        self._collector = RolloutCollector(
            config, actor_groups, self.fault_tolerance, self._generation, self._requests, self.timer
        )
        self._updater = ModelUpdater(config, actor_groups, self._generation, self.timer)

    @property
    def abandonable(self) -> bool:
        """True while responses are sampled and scored, which changes no state."""
        return self.consistent and (self._evaluating or self._open.timing is not None)

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """Draw the next training prompts; see `PPOTrainer.prompts`."""
        self._begin()
        if self._ahead:
            if count is not None:
                raise UserError(
                    f"prompts({count}): with async.max_staleness above 0 whole steps are drawn; leave the count out"
                )
            self._open.issued = self._pipeline.pop(self.steps_done)
            prompts = self._open.issued.prompts
        else:
            prompts = self.sampler.next(self.config.rollout.prompts_per_step if count is None else count)
        self._open.drawn += [prompt.id for prompt in prompts]
        return prompts

    def generate(self, prompts: Sequence[Prompt], *, temperature: float | None = None) -> list[Rollout]:
        """Sample responses with the current weights; see `PPOTrainer.generate`."""
        self._begin()
        with self.timer.phase("generate"):
            finished = [rollout for batch in self._stream(prompts, temperature) for rollout in batch]
        return sorted(finished, key=lambda rollout: rollout.key)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> ScoredRollouts:
        """Score rollouts of these prompts; see `PPOTrainer.score`."""
        self._begin()
        scorer = self._collector.scorer(prompts)
        scorer.add(with_extra_segments(rollouts))
        return self._collector.with_greedy(scorer.finish(), self.steps_done)

    def rescore(self, scored: ScoredRollouts) -> ScoredRollouts:
        """Compute the outputs of the models again; rewards and greedy responses stay."""
        self._begin()
        scorer = self._collector.scorer(list(scored.prompts.values()), scored.reward_rows())
        scorer.add(scored.rollouts)
        return replace(scorer.finish(), greedy=scored.greedy)

    def generate_and_score(self, prompts: Sequence[Prompt]) -> ScoredRollouts:
        """Generate and score, overlapping where roles do not share devices."""
        self._begin()
        scorer = self._collector.scorer(prompts)
        with self.timer.phase("generate"):
            for finished in self._stream(prompts, None):
                scorer.add(with_extra_segments(finished))
        return self._collector.with_greedy(scorer.finish(), self.steps_done)

    def train_step(self) -> dict[str, float]:
        """Draw prompts and run one whole step on them; returns its metrics."""
        strict, divergence = self._open.timing is None, self.config.teacher.divergence if self.config.teacher else None
        self._begin()
        if divergence is not None and divergence.student_share < 1:
            given = is_given_step(self.config, self.steps_done)
            self._open.ledger.strict = strict and not given
            scored = self._given_and_scored() if given else self.generate_and_score(self.prompts())
            self._open.metrics = {STUDENT_STEP: float(not given)}
            return self.step(scored)
        self._open.ledger.strict = strict
        if not self._collector.chooses_groups:
            return self.step(self.generate_and_score(self.prompts()))
        scored, self._open.metrics = self._collector.chosen(self.prompts, self._open.numbers, self._open.ledger)
        return self.step(self._collector.with_greedy(scored, self.steps_done))

    def step(self, scored: ScoredRollouts, rewards: OwnRewards | None = None) -> dict[str, float]:
        """Learn from scored rollouts and sync the weights; see `PPOTrainer.step`."""
        self._begin()
        scored = self._with_rewards(scored, rewards)
        self.consistent = False
        with self.timer.phase("witness"):
            self._open.ledger.check_scored(scored, self._open.drawn, self.config.rollout.samples_per_prompt)
        watched = self._observer is not None and self._observer.weights
        before, state = self._checksums(watched), self._experience.state_dict()
        with self.timer.phase("assemble"):
            experience = self._experience.make(scored)
        with self.timer.phase("witness"):
            ledger = self._open.ledger.check_batch(experience, scored)
        own = own_rows(self.config, scored.rollouts)
        staleness = staleness_metrics(scored.rollouts, self.weight_version, self.config.asynchronous.max_staleness)
        if self.config.old_logprobs == "recomputed" and not self.config.trains_without_demonstrations:
            arrays = experience.batch.arrays
            counted = np.logical_and(arrays["action_mask"], own[:, None])
            gap = fresh_gap(arrays["old_logprobs"], counted, scored.rollouts, self.weight_version)
            check_gap(self.steps_done, gap, self.config.rollout.mismatch_alarm)
        if self.config.rollout.sleep:
            with self.timer.phase("sleep"):
                put_to_sleep(self.fault_tolerance.pool, self.config.deadlines.sync)
        reports = self._updater.update(experience, self.steps_done)
        if self.config.old_logprobs != "recomputed" and "policy" in reports:
            gap = next((first.get(LOGPROB_GAP) for first in reports["policy"].step_metrics), None)
            check_gap(self.steps_done, gap, self.config.rollout.mismatch_alarm)
        with self.timer.phase("weight_sync"):
            sync = self.sync(self.weight_version + 1)
        self.steps_done += 1
        self._weights = None
        metrics = step_metrics(experience, reports, sync, self.steps_done * self.config.samples_per_step)
        metrics |= self._arrival_metrics()
        after = self._checksums(watched or self._exact)
        metrics |= staleness | cache_metrics(scored.rollouts) | ledger
        metrics |= reward_metrics(scored, own) | checksum_metrics(after)
        metrics |= self._open.metrics or self._episode_metrics(scored)
        if self._observer is not None:
            with self.timer.phase(RECORD):
                plan, served = step_plan(self.config, experience, self.steps_done - 1), self._generation.served_by
                begun = (self.steps_done, self.weight_version - 1, self._open.drawn, served, state)
                self._observer(ExecutedStep(*begun, scored, experience, plan, reports, before, after, dict(metrics)))
        self._generation.forget(self.steps_done)
        self.sampler.consumed(self._open.drawn)
        self._stream_witness.check(self.steps_done, self._open.drawn, strict=self._open.ledger.strict)
        self.close_step()
        self.consistent = True
        self.fault_tolerance.step_completed()
        tokens = metrics.get(SAMPLED_TOKENS, sum(len(rollout.response_ids) for rollout in scored.rollouts))
        metrics |= self.timer.metrics(generated_tokens=int(tokens))
        for callback in self.callbacks:
            callback.on_step_end(self.steps_done, metrics, scored)
        return metrics

    def warm_up(self, batch: TrainingBatch) -> UpdateReport:
        """Train on given responses before the first step, and sync the replicas."""
        self.consistent = False
        self._weights = None
        report = self._updater.warm_up(batch)
        self.sync(self.weight_version + 1)
        self.warmed_up = self.consistent = True
        return report

    def evaluate(self, reward: OwnReward | None = None) -> Evaluation:
        """Answer and score the held-out prompts; see `PPOTrainer.evaluate`."""
        if reward is None and not self.config.reward.configured:
            raise UserError("evaluate: the configuration has no reward; expected evaluate(reward=...)")
        requests = self._requests.build(self.evaluation_prompts, 1, 0)
        self._evaluating = True
        scored = self._collector.with_rewards_only(self.evaluation_prompts, requests, self.config.evaluation.temperature)
        self._evaluating = False
        prompts = tuple(scored.prompts[rollout.key.prompt] for rollout in scored.rollouts)
        if reward is not None:
            scored = scored.with_rewards(reward(prompts, scored.rollouts))
        evaluation = Evaluation(self.steps_done, prompts, scored.rollouts, scored.rewards)
        for callback in self.callbacks:
            callback.on_evaluation(self.steps_done, evaluation)
        return evaluation

    def sample(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Sample requests outside of the step."""
        batch = self._generation.add(requests, temperature)
        return [rollout for finished in self._collector.stream(batch) for rollout in finished]

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, adapters merged."""
        policy = self.actor_groups["policy"]
        policy.wait(policy.export(folder.absolute()), "export", self.config.deadlines.update)

    @cached_property
    def sync_dtype(self) -> SyncDtype:
        """Data type in which weights travel: the one that the policy's device computes in."""
        policy = self.actor_groups["policy"]
        (dtype,) = policy.wait(policy.sync_dtype(), "weight sync", self.config.deadlines.sync)
        return dtype

    def vitals(self) -> dict[str, Any]:
        """Return the driver's current state, from any thread: steps done, weight version, open requests."""
        return {"step": self.steps_done, "version": self.weight_version, "requests": self._generation.vitals()}

    def state(self) -> dict[str, Any]:
        """Return the driver's part of a checkpoint."""
        return {
            "step": self.steps_done,
            "weight_version": self.weight_version,
            "warmed_up": self.warmed_up,
            "sampler": self.sampler.state_dict(),
            "experience": self._experience.state_dict(),
            "optimizer_steps": self._updater.witness.state(),
            "stream": self._stream_witness.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the replicas get the policy's weights before they sample.

        Responses in flight are dropped. Their prompts are outstanding in the sampler, and are drawn again first.
        """
        self.close_step()
        self._pipeline.reset()
        self._weights = None
        self.steps_done = state["step"]
        self.warmed_up = state["warmed_up"]
        self.sampler.load_state_dict(state["sampler"])
        self._experience.load_state_dict(state["experience"])
        self._updater.witness.load_state(state.get("optimizer_steps"))
        self._stream_witness.load_state(state.get("stream"))
        self.sync(state["weight_version"])
        self.consistent = True

    def sync(self, version: int) -> SyncReport:
        """Send the policy's weights to every live replica; rebuilt ones get them later."""
        pool = self.fault_tolerance.pool
        pool.poll_rebuilds()
        if self.config.asynchronous.on_update == "cut":
            self._generation.cut()
        self.weight_version = version
        return self._send_weights([*pool.serving, *pool.stale])

    @property
    def _exact(self) -> bool:
        return self.config.run.determinism == "exact"

    def _checksums(self, wanted: bool) -> Weights:
        if wanted and self._weights is None:
            with self.timer.phase(CHECKSUMS):
                self._weights = self._updater.weights()
        return self._weights or {} if wanted else {}

    @property
    def _ahead(self) -> bool:
        return self.config.asynchronous.max_staleness > 0

    def _begin(self) -> None:
        """Start timing the step at its first primitive."""
        if self._open.timing is None:
            self._open.timing = ExitStack()
            self._open.timing.enter_context(self.timer.step())
            self._open.ledger.step = self.steps_done

    def close_step(self) -> None:
        """Close the step in progress, completed or abandoned."""
        if self._open.timing is not None:
            self._open.timing.close()
        self._open = OpenStep()

    def _stream(self, prompts: Sequence[Prompt], temperature: float | None) -> Iterator[list[Rollout]]:
        """Yield rollouts as they finish, of a step issued ahead or of new requests."""
        rollout, issued = self.config.rollout, self._open.issued
        if issued is not None and temperature is None and [p.id for p in prompts] == [p.id for p in issued.prompts]:
            self._open.issued, batch = None, issued.batch
            self._open.numbers |= {request.key.prompt: request.key.sample + 1 for request in batch.requests}
        else:
            requests = self._requests.build(prompts, rollout.samples_per_prompt, self.steps_done, self._open.numbers)
            batch = self._generation.add(requests, rollout.temperature if temperature is None else temperature)
        self._open.requested += len(batch.requests)
        return self._collector.stream(batch, self._open.ledger)

    def _given_and_scored(self) -> ScoredRollouts:
        """Score as many responses of the dataset as a step has samples."""
        prompts = self.prompts(self.config.samples_per_step)
        requests = self._requests.build(prompts, 1, self.steps_done, self._open.numbers)
        return self._given.scored(self._collector.scorer(prompts), prompts, requests, self.weight_version)

    def _with_rewards(self, scored: ScoredRollouts, rewards: OwnRewards | None) -> ScoredRollouts:
        """Check that every rollout has a reward, and put the loop's own in place."""
        if rewards is None:
            if np.isnan(scored.rewards.scores).any():
                raise UserError("step: the configuration has no reward; expected step(scored, rewards=...)")
            return scored
        if self.config.needs_greedy:
            name = self.config.algorithm.advantage.estimator
            raise UserError(f"step: estimator '{name}' also needs rewards of greedy responses; expected a configured reward")
        scored, shaping = scored.with_rewards(rewards), self.config.algorithm.shaping
        if scored.rewards.tokens is not None and (shaping.scale or shaping.center or shaping.clip is not None):
            raise UserError("step: algorithm.shaping.scale, center and clip change whole scores; expected one reward a rollout")
        return scored

    def _arrival_metrics(self) -> dict[str, float]:
        """Return the share of the update that arrived, where weights are rounded on their way."""
        if self.actor_groups.specs.serves_adapters or self.sync_dtype == "float32":
            return {}
        policy = self.actor_groups["policy"]
        (share,) = policy.wait(policy.update_arrived(), "weight sync", self.config.deadlines.sync)
        return {} if share is None else {UPDATE_ARRIVED: share}

    def _episode_metrics(self, scored: ScoredRollouts) -> dict[str, float]:
        if self.config.environment is None or not self._open.requested:
            return {}
        return episode_metrics(scored.rollouts, self._open.requested)

    def _send_weights(self, replicas: Sequence[RolloutReplica]) -> SyncReport:
        specs, devices = self.actor_groups.specs, self.config.rollout.devices
        transfer = make_transfer(
            specs.weight_transfer, devices, self.sync_dtype, self.config.deadlines.sync, adapters=specs.serves_adapters
        )
        return sync_weights(self.actor_groups["policy"], self.fault_tolerance.pool, replicas, self.weight_version, transfer)

    def _refresh(self, replicas: Sequence[RolloutReplica]) -> None:
        """Sync rebuilt replicas; before the first sync they load the start weights themselves."""
        if self.weight_version:
            self._send_weights(replicas)
        else:
            for replica in replicas:
                self.fault_tolerance.pool.synced(replica)
