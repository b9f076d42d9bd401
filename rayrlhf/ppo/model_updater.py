"""Runs the optimizer steps of a PPO step on the learning roles."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.placement import TrainRole
from rayrlhf.actors.remote import PendingCalls, put
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.library_types import Tokenizer
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.generation import Generation
from rayrlhf.ppo.given_responses import response_encoder
from rayrlhf.ppo.pair_batch import TrainedBatch, trained_batch
from rayrlhf.ppo.update_objectives import learning_roles, make_objectives, plan_update
from rayrlhf.ppo.update_witness import BatchFacts, UpdateWitness


class ModelUpdater:
    """Updates policy and critic.

    Args:
        generation: keeps the replicas busy during an update.
        timer: counts the update of each role as a phase.

    Attributes:
        witness: checks the ranks' reports of an update.
    """

    def __init__(self, config: PPOConfig, actor_groups: ActorGroups, generation: Generation, timer: PhaseTimer) -> None:
        self._config = config
        self._actor_groups = actor_groups
        self._generation = generation
        self._timer = timer
        self._objectives = make_objectives(config)
        self.witness = UpdateWitness(config)

    def update(self, experience: Experience, step: int) -> dict[TrainRole, UpdateReport]:
        """Run the optimizer steps of the learning roles, concurrently where they have own devices.

        Raises:
            AlarmError: a sample was not trained on as planned.
        """
        config, train = self._config, self._config.train
        trained = trained_batch(config, experience)
        plan = _plan(config, trained, step)
        batch, lengths = put(trained.batch), trained.batch.lengths
        tokens = sum(lengths[row] for group in trained.groups for row in group) * train.epochs
        calls: dict[TrainRole, PendingCalls[UpdateReport]] = {}
        reports: dict[TrainRole, UpdateReport] = {}
        facts: BatchFacts | None = None
        overlap = self._actor_groups.plan.overlap
        objectives = learning_roles(self._objectives, config, step)
        if overlap:
            calls = {role: self._actor_groups[role].update(batch, plan, goal) for role, goal in objectives.items()}
        for role, objective in objectives.items():
            with self._timer.phase(f"update_{role}", tokens):
                pending = calls[role] if overlap else self._actor_groups[role].update(batch, plan, objective)
                self._generation.meanwhile(pending, config.deadlines.update)
                by_rank = self._actor_groups[role].wait(pending, f"{role} update", config.deadlines.update)
            with self._timer.phase("witness"):
                facts = facts or BatchFacts(trained)
                self.witness.check(step, role, by_rank, facts)
            reports[role] = by_rank[0]
        return reports

    def warm_up(self, batch: TrainingBatch) -> UpdateReport:
        """Train the policy on given responses by cross-entropy, one pass."""
        plan = sft_warmup_plan(self._config, len(batch))
        policy = self._actor_groups["policy"]
        pending = policy.update(put(batch), plan, CrossEntropyObjective(self._config.rollout.temperature))
        report = policy.wait(pending, "warm-up", self._config.deadlines.update)[0]
        self.witness.count(-1, "policy", report)
        return report

    def weights(self) -> dict[TrainRole, dict[str, int]]:
        """Return a checksum of each learning role's parameters, which differs if one bit differs."""
        seconds = self._config.deadlines.update
        groups = {role: self._actor_groups[role] for role in self._objectives}
        return {role: group.wait(group.checksums(), "checksum", seconds)[0] for role, group in groups.items()}


def step_plan(config: PPOConfig, experience: Experience, step: int) -> UpdatePlan:
    """Return the samples of each optimizer step of a step, counted from 0."""
    return _plan(config, trained_batch(config, experience), step)


def _plan(config: PPOConfig, trained: TrainedBatch, step: int) -> UpdatePlan:
    return plan_update(trained.groups, config.train.epochs, config.mini_batch_size, config.run.seed, step)


def checksum_metrics(weights: Mapping[TrainRole, Mapping[str, int]]) -> dict[str, float]:
    """Return a 48-bit checksum of each role's weights as a metric."""
    digests = {role: hashlib.sha256(json.dumps(parts).encode()).digest() for role, parts in weights.items()}
    return {f"{role}/weights_checksum": float(int.from_bytes(digest[:6], "big")) for role, digest in digests.items()}


def sft_warmup_batch(config: PPOConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> TrainingBatch:
    """Return the first `sft_warmup.samples` shuffled prompts with their responses and a stop token."""
    warmup = config.sft_warmup
    if warmup is None:
        raise ValueError("the configuration has no sft_warmup")
    order = np.random.default_rng(config.run.seed).permutation(len(prompts))[: warmup.samples]
    encode = response_encoder(config, tokenizer)
    sequences = []
    for index in order:
        prompt = prompts[index]
        ids = encode(prompt.columns[warmup.response_field])
        sequences.append(TokenSequence(np.concatenate([prompt.token_ids, ids]), len(prompt.token_ids)))
    lengths = np.array([sequence.response_length for sequence in sequences])
    return TrainingBatch(sequences, {"action_mask": np.arange(lengths.max()) < lengths[:, None]})


def sft_warmup_plan(config: PPOConfig, samples: int) -> UpdatePlan:
    """Return one pass in order, in optimizer steps of `sft_warmup.mini_batch_size`."""
    size = config.sft_warmup.mini_batch_size if config.sft_warmup else samples
    return UpdatePlan([[list(range(start, min(start + size, samples))) for start in range(0, samples, size)]])
