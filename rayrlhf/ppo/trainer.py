"""The PPO driver: one loop over sample, score, assemble, update, sync.

The driver holds references, token ids and per-token scalars; weights and logits never pass through it. Its primitives
`generate`, `score` and `step` are public, so that a user can write a loop of their own; `train_step` is the built-in one.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from rayrlhf.actors.crew import Crew
from rayrlhf.actors.placement import Role
from rayrlhf.actors.waiting import wait_all
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.data.sampler import PromptSampler
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.interfaces import Want
from rayrlhf.engines.objectives import ImitationObjective
from rayrlhf.engines.update_plan import UpdateReport
from rayrlhf.errors import AlarmError
from rayrlhf.models.load import resolve_dtype
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.evaluation import Evaluation
from rayrlhf.ppo.experience import LOGPROB_GAP, Experience, ExperienceMaker
from rayrlhf.ppo.generation import generate, make_requests
from rayrlhf.ppo.objectives import make_objectives, plan_update
from rayrlhf.ppo.scoring import Reading, ScoredRollouts, Scorer
from rayrlhf.ppo.step_metrics import reward_metrics, step_metrics
from rayrlhf.ppo.warmup import imitation_plan
from rayrlhf.ppo.weight_sync import SyncReport, sync_weights


class PPOTrainer:
    """Drives the actors of one run.

    Args:
        config: the resolved configuration.
        crew: the running actors.
        sampler: the training prompts.
        evaluation_prompts: the held-out prompts; empty for no evaluation.
        timer: collects the phases of a step.
        callbacks: called in order after each step and evaluation.
    """

    def __init__(
        self,
        config: PPOConfig,
        crew: Crew,
        sampler: PromptSampler,
        evaluation_prompts: Sequence[Prompt] = (),
        timer: PhaseTimer | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.config = config
        self.crew = crew
        self.sampler = sampler
        self.evaluation_prompts = tuple(evaluation_prompts)
        self.timer = timer or PhaseTimer()
        self.callbacks = list(callbacks)
        self.steps_done = 0
        self.weight_version = 0
        self._experience = ExperienceMaker(config)
        self._objectives = make_objectives(config)

    def generate(self, prompts: Sequence[Prompt], *, temperature: float | None = None) -> list[Rollout]:
        """Sample `rollout.samples_per_prompt` responses a prompt, with the current weights, in the order of their keys."""
        requests = make_requests(prompts, self.config.rollout.samples_per_prompt, self.steps_done, self.config.run.seed)
        finished = [rollout for batch in self._stream(requests, temperature) for rollout in batch]
        return sorted(finished, key=lambda rollout: rollout.key)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> ScoredRollouts:
        """Rewards, reference log-probs, values and old log-probs of rollouts of these prompts."""
        scorer = self._scorer(prompts)
        scorer.add(rollouts)
        return scorer.finish()

    def step(self, scored: ScoredRollouts) -> dict[str, float]:
        """One PPO step on scored rollouts: advantages, all epochs of updates, weight sync. Returns the metrics.

        Raises:
            AlarmError: trainer and sampler disagree on the rollouts' log-probs by more than `rollout.mismatch_alarm`.
        """
        with self.timer.phase("assemble"):
            experience = self._experience.make(scored)
        gap = experience.metrics[LOGPROB_GAP]
        if not gap <= self.config.rollout.mismatch_alarm:
            raise AlarmError(
                f"step {self.steps_done}: trainer and sampler log-probs differ by {gap:.3g} nats on average, above rollout."
                f"mismatch_alarm {self.config.rollout.mismatch_alarm:g}: the rollout engine does not serve the policy's weights"
            )
        reports = self._update(experience)
        self.steps_done += 1
        with self.timer.phase("weight_sync"):
            sync = self._sync()
        episodes = self.steps_done * self.config.samples_per_step
        return step_metrics(experience, reports, sync, episodes) | reward_metrics(scored)

    def train_step(self) -> dict[str, float]:
        """Sample prompts and run one whole PPO step, scoring rollouts as they finish where roles do not share devices."""
        with self.timer.step():
            prompts = self.sampler.next(self.config.rollout.prompts_per_step)
            requests = make_requests(prompts, self.config.rollout.samples_per_prompt, self.steps_done, self.config.run.seed)
            scorer = self._scorer(prompts)
            with self.timer.phase("generate"):
                for finished in self._stream(requests, None):
                    scorer.add(finished)
            scored = scorer.finish()
            metrics = self.step(scored)
            self.sampler.consumed([prompt.id for prompt in prompts])
        metrics |= self.timer.metrics(generated_tokens=sum(len(rollout.response_ids) for rollout in scored.rollouts))
        for callback in self.callbacks:
            callback.on_step_end(self.steps_done, metrics, scored)
        return metrics

    def warm_up(self, batch: TrainingBatch) -> UpdateReport:
        """Imitate given responses before the first step, and bring the replicas up to date."""
        plan = imitation_plan(self.config, len(batch))
        pending = self.crew["policy"].call("update", ray.put(batch), plan, ImitationObjective(self.config.rollout.temperature))
        report: UpdateReport = wait_all(pending, "warm-up", self.config.deadlines.update)[0]
        self._sync()
        return report

    def evaluate(self) -> Evaluation:
        """Answer and score the held-out prompts, one response each at `evaluation.temperature`."""
        requests = make_requests(self.evaluation_prompts, 1, 0, self.config.run.seed)
        stream = self._stream(requests, self.config.evaluation.temperature)
        rollouts = sorted((r for batch in stream for r in batch), key=lambda rollout: rollout.key)
        by_id = {prompt.id: prompt for prompt in self.evaluation_prompts}
        scorer = Scorer(self.crew["reward"], (), by_id, False, self.config.deadlines.score, self.timer)
        scorer.add(rollouts)
        rewards = scorer.finish().rewards
        prompts = tuple(by_id[rollout.key.prompt] for rollout in rollouts)
        evaluation = Evaluation(self.steps_done, prompts, tuple(rollouts), rewards)
        for callback in self.callbacks:
            callback.on_evaluation(self.steps_done, evaluation)
        return evaluation

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (adapters merged) that transformers and vLLM load unchanged."""
        self.crew["policy"].all("export", folder.absolute(), seconds=self.config.deadlines.update)

    @property
    def sync_dtype(self) -> Literal["float32", "bfloat16"]:
        """Data type in which weights travel to the replicas: the one they compute in."""
        return "bfloat16" if resolve_dtype(self.config.model.dtype) == torch.bfloat16 else "float32"

    def state(self) -> dict[str, Any]:
        """The driver's part of a checkpoint."""
        return {
            "step": self.steps_done,
            "weight_version": self.weight_version,
            "sampler": self.sampler.state_dict(),
            "experience": self._experience.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the replicas get the policy's weights before they sample."""
        self.steps_done = state["step"]
        self.weight_version = state["weight_version"]
        self.sampler.load_state_dict(state["sampler"])
        self._experience.load_state_dict(state["experience"])
        sync_weights(
            self.crew["policy"], self.crew["rollout"], self.weight_version, self.sync_dtype, self.config.deadlines.sync
        )

    def _sync(self, version: int | None = None) -> SyncReport:
        """Bring every replica to the policy's weights, as the next version if none is given."""
        self.weight_version = self.weight_version + 1 if version is None else version
        policy, replicas = self.crew["policy"], self.crew["rollout"]
        return sync_weights(policy, replicas, self.weight_version, self.sync_dtype, self.config.deadlines.sync)

    def _stream(self, requests: list[Any], temperature: float | None) -> Iterable[list[Rollout]]:
        rollout = self.config.rollout
        wanted = rollout.temperature if temperature is None else temperature
        return generate(self.crew["rollout"], requests, wanted, rollout.max_new_tokens, self.config.deadlines.generate)

    def _scorer(self, prompts: Sequence[Prompt]) -> Scorer:
        by_id = {prompt.id: prompt for prompt in prompts}
        seconds = self.config.deadlines.score
        return Scorer(self.crew["reward"], self._readings(), by_id, self.crew.plan.overlap, seconds, self.timer)

    def _readings(self) -> list[Reading]:
        """Which models read the rollouts, and what for. Forwards that nothing needs are not among them."""
        config, crew = self.config, self.crew
        temperature = config.rollout.temperature
        logprobs: frozenset[Want] = frozenset({"logprobs"})
        values: frozenset[Want] = frozenset({"values"})
        replicate = config.train.zero_stage == 3
        readings = []
        if config.needs_reference:
            owner = crew["policy"] if config.reference_in_policy else crew["reference"]
            shared_copy = config.reference_in_policy and replicate
            readings.append(Reading("reference", owner, logprobs, temperature, True, shared_copy))
        if "critic" in crew:
            readings.append(Reading("critic", crew["critic"], values, replicate=replicate))
        own = logprobs | values if config.critic.kind == "shared" else logprobs
        readings.append(Reading("policy", crew["policy"], own, temperature, replicate=replicate))
        return readings

    def _update(self, experience: Experience) -> dict[Role, UpdateReport]:
        """Run the optimizer steps of every learning role: side by side on devices of their own, else in turns."""
        config = self.config
        train = config.train
        plan = plan_update(len(experience), train.epochs, config.mini_batch_size, config.run.seed, self.steps_done)
        batch = ray.put(experience.batch)
        tokens = sum(experience.batch.lengths) * train.epochs
        calls: dict[Role, dict[str, ray.ObjectRef]] = {}
        reports: dict[Role, UpdateReport] = {}
        overlap = self.crew.plan.overlap
        if overlap:
            calls = {role: self.crew[role].call("update", batch, plan, goal) for role, goal in self._objectives.items()}
        for role, objective in self._objectives.items():
            with self.timer.phase(f"update_{role}", tokens):
                pending = calls[role] if overlap else self.crew[role].call("update", batch, plan, objective)
                reports[role] = wait_all(pending, f"{role} update", config.deadlines.update)[0]
        return reports
