"""Runs the optimizer steps of a PPO step on the learning roles."""

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.placement import TrainRole
from rayrlhf.actors.remote import PendingCalls, put
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective
from rayrlhf.engines.train.plan import UpdateReport
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.generation import Generation
from rayrlhf.ppo.sft_warmup import sft_warmup_plan
from rayrlhf.ppo.update_objectives import learning_roles, make_objectives, plan_update


class ModelUpdater:
    """Updates policy and critic.

    Args:
        generation: keeps the replicas busy during an update.
        timer: counts the update of each role as a phase.
    """

    def __init__(self, config: PPOConfig, actor_groups: ActorGroups, generation: Generation, timer: PhaseTimer) -> None:
        self._config = config
        self._actor_groups = actor_groups
        self._generation = generation
        self._timer = timer
        self._objectives = make_objectives(config)

    def update(self, experience: Experience, step: int) -> dict[TrainRole, UpdateReport]:
        """Run the optimizer steps of the learning roles, concurrently where they have own devices."""
        config, train = self._config, self._config.train
        plan = plan_update(experience.learnable, train.epochs, config.mini_batch_size, config.run.seed, step)
        batch = put(experience.batch)
        lengths = experience.batch.lengths
        tokens = sum(lengths[row] for row in experience.learnable) * train.epochs
        calls: dict[TrainRole, PendingCalls[UpdateReport]] = {}
        reports: dict[TrainRole, UpdateReport] = {}
        overlap = self._actor_groups.plan.overlap
        objectives = learning_roles(self._objectives, config, step)
        if overlap:
            calls = {role: self._actor_groups[role].update(batch, plan, goal) for role, goal in objectives.items()}
        for role, objective in objectives.items():
            with self._timer.phase(f"update_{role}", tokens):
                pending = calls[role] if overlap else self._actor_groups[role].update(batch, plan, objective)
                self._generation.meanwhile(pending, config.deadlines.update)
                reports[role] = self._actor_groups[role].wait(pending, f"{role} update", config.deadlines.update)[0]
        return reports

    def warm_up(self, batch: TrainingBatch) -> UpdateReport:
        """Train the policy on given responses by cross-entropy, one pass."""
        plan = sft_warmup_plan(self._config, len(batch))
        policy = self._actor_groups["policy"]
        pending = policy.update(put(batch), plan, CrossEntropyObjective(self._config.rollout.temperature))
        return policy.wait(pending, "warm-up", self._config.deadlines.update)[0]

    def checksums(self) -> dict[str, float]:
        """Return a checksum of each learning role's weights, which differs if one bit differs."""
        checksums = {}
        for role in self._objectives:
            group = self._actor_groups[role]
            value = group.wait(group.checksum(), "checksum", self._config.deadlines.update)[0]
            checksums[f"{role}/weights_checksum"] = float(value)
        return checksums
