"""Root of a PPO configuration file, and checks across its sections."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.algorithm import AlgorithmSection
from rayrlhf.config.data import DataSection
from rayrlhf.config.model import CriticSection, ModelSection, ReferenceSection, TeacherSection
from rayrlhf.config.policy_loss import check_name
from rayrlhf.config.rank_groups import check_whole_rows, group_label
from rayrlhf.config.reward import PPORewardSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.config.routing import check_routing
from rayrlhf.config.runtime import (
    AsyncSection,
    CheckpointSection,
    DeadlineSection,
    EvaluationSection,
    ObserveSection,
    PlacementSection,
    RecoverySection,
    RunSection,
    SFTWarmupSection,
)
from rayrlhf.config.section import Section
from rayrlhf.config.train import TrainSection

if TYPE_CHECKING:
    from rayrlhf.algorithms.estimator import AdvantageMethod


class PPOConfig(Section):
    """Configuration of `rayrlhf ppo`."""

    renamed_keys: ClassVar = {"warmup": "sft_warmup"}

    run: RunSection = RunSection()
    model: ModelSection
    reference: ReferenceSection = ReferenceSection()
    teacher: TeacherSection | None = None
    """Teacher of on-policy distillation. Default: none."""
    critic: CriticSection = CriticSection()
    reward: PPORewardSection
    environment: EnvironmentSection | None = None
    """Environment of multi-turn responses. Its rewards are the reward function `environment`. Default: responses of one
    turn."""
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    asynchronous: AsyncSection = Field(AsyncSection(), alias="async")
    """Asynchronous sampling ahead of training."""
    train: TrainSection = TrainSection()
    sft_warmup: SFTWarmupSection | None = None
    """SFT warm-up before the first step. Default: none."""
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    placement: PlacementSection = PlacementSection()
    deadlines: DeadlineSection = DeadlineSection()
    observe: ObserveSection = ObserveSection()

    @property
    def samples_per_step(self) -> int:
        """Responses per step."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def mini_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.train.mini_batch_size or self.samples_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one model per step, unless early stopping ends the epochs."""
        compared = self.algorithm.online_dpo
        rows = self.samples_per_step // (2 if compared is not None and compared.variant == "nash_md" else 1)
        return self.train.epochs * -(-rows // self.mini_batch_size)

    @property
    def overlong_tokens(self) -> int | None:
        """Length of the overlong zone before `rollout.max_new_tokens`, in tokens; None without a penalty."""
        buffer = self.algorithm.shaping.overlong_buffer
        if buffer is None or buffer >= 1:
            return None if buffer is None else int(buffer)
        return max(1, round(buffer * self.rollout.max_new_tokens))

    @property
    def needs_reference(self) -> bool:
        """True if the objective reads reference log-probs."""
        return self.algorithm.kl.coefficient > 0 or self.algorithm.online_dpo is not None

    @property
    def old_logprobs(self) -> Literal["recomputed", "rollout", "skipped"]:
        """Source of the old log-probs, resolved from `algorithm.old_logprobs`."""
        algorithm = self.algorithm
        if algorithm.old_logprobs != "auto":
            return algorithm.old_logprobs
        needed = (
            self.updates_per_step > 1
            or algorithm.parity.no_accumulation
            or self.critic.kind == "shared"  # its values come from the same forward pass
            or (self.needs_reference and algorithm.kl.placement == "reward")
            or self.teacher is not None
            or algorithm.online_dpo is not None  # its update reads none, so nothing else could show that a sync arrived
            or algorithm.off_policy_correction.enabled
            or algorithm.policy_loss.kind == "plugin"
            or self.asynchronous.max_staleness > 0
            or self.trains_without_demonstrations
            or self.environment is not None  # segments make more rows than samples, so more than one optimizer step
        )
        return "recomputed" if needed else "skipped"

    @property
    def opponent_share(self) -> float:
        """Share of the reference in the opponent of the policy; 0 for the policy itself."""
        pairs = self.algorithm.online_dpo
        return 0.0 if pairs is None else pairs.opponent_share

    @property
    def needs_greedy(self) -> bool:
        """True if the advantage estimator reads the score of a greedy response."""
        return _advantage_method(self).greedy

    @property
    def reference_in_policy(self) -> bool:
        """True if the policy without its adapters serves as the reference."""
        return self.needs_reference and self.model.lora is not None and self.reference.model is None

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Self:
        if self.samples_per_step % self.mini_batch_size:
            raise ValueError(
                f"train.mini_batch_size {self.mini_batch_size} does not divide the {self.samples_per_step} samples of a step "
                "(rollout.prompts_per_step x rollout.samples_per_prompt)"
            )
        policy = self.placement.policy
        if self.mini_batch_size < policy.data_ranks:
            raise ValueError(
                f"train.mini_batch_size {self.mini_batch_size} is smaller than placement.policy.ranks {policy.ranks}"
                f"{group_label(policy)}"
            )
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        models = {"policy": self.model}
        if self.critic.kind == "separate":
            models["critic"] = self.critic.model or self.model
        for role, model in models.items():
            placement, key = getattr(self.placement, role), f"placement.{role}"
            check_whole_rows(placement, key, model, self.train)
            self.train.check_shared_weights(key, placement)
        return self

    @model_validator(mode="after")
    def _check_critic(self) -> Self:
        # Imported here: the registry imports torch, which reading a configuration does not need otherwise.
        from rayrlhf.algorithms.advantages import ADVANTAGE_ESTIMATORS

        name = self.algorithm.advantage.estimator
        check_name("algorithm.advantage.estimator", name, ADVANTAGE_ESTIMATORS, "estimator")
        needed = _advantage_method(self).critic
        if needed and self.critic.kind == "none":
            raise ValueError(
                f"algorithm.advantage.estimator '{name}' needs a critic: set critic.kind to 'separate' or 'shared'"
            )
        if not needed and not self.critic.model_fields_set:
            # A default that follows another section; a section is frozen from here on.
            object.__setattr__(self, "critic", CriticSection(kind="none"))
        if not needed and self.critic.kind != "none":
            raise ValueError(f"algorithm.advantage.estimator '{name}' does not use a critic: set critic.kind to 'none'")
        return self

    @model_validator(mode="after")
    def _check_old_logprobs(self) -> Self:
        check_routing(self)
        if self.algorithm.old_logprobs == "rollout":
            if self.algorithm.off_policy_correction.enabled:
                raise ValueError(
                    "algorithm.off_policy_correction has no effect with old_logprobs 'rollout', whose ratio contains it: set "
                    "its level and rejection to 'none', or old_logprobs to 'recomputed'"
                )
            if self.asynchronous.max_staleness:
                raise ValueError(
                    "algorithm.old_logprobs 'rollout' would hide a lost weight sync where tokens are stale: set it to "
                    "'recomputed', or async.max_staleness to 0"
                )
            if self.trains_without_demonstrations:
                raise ValueError(
                    "algorithm.old_logprobs 'rollout' would be those of prompts with demonstrations: set it to 'recomputed'"
                )
        return self

    @model_validator(mode="after")
    def _check_group_size(self) -> Self:
        name, shaping = self.algorithm.advantage.estimator, self.algorithm.shaping
        method, samples = _advantage_method(self), self.rollout.samples_per_prompt
        if samples < method.smallest_group:
            raise ValueError(
                f"algorithm.advantage.estimator '{name}' compares responses to one prompt: set rollout.samples_per_prompt to "
                f"{method.smallest_group} or more, found {samples}"
            )
        if method.greedy and (shaping.scale or shaping.center):
            raise ValueError(
                f"algorithm.shaping.scale and center shift scores relative to the greedy response, which is the baseline of "
                f"algorithm.advantage.estimator '{name}': switch them off"
            )
        return self

    @model_validator(mode="after")
    def _check_estimator_inputs(self) -> Self:
        from rayrlhf.config.estimator_checks import check_estimator_inputs

        check_estimator_inputs(self, _advantage_method(self))
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        from rayrlhf.config.sampling_checks import check_overissue, check_refill

        check_refill(self, _advantage_method(self))
        check_overissue(self)
        return self

    @property
    def trains_without_demonstrations(self) -> bool:
        """True if trained models read prompts without the rollout engine's demonstrations."""
        shown = self.rollout.demonstrations
        return shown is not None and shown.train_with == "without_demonstrations"

    @model_validator(mode="after")
    def _check_demonstrations(self) -> Self:
        shown = self.rollout.demonstrations
        if shown is None:
            return self
        if self.environment is not None:
            raise ValueError("rollout.demonstrations: an environment starts its own conversation; remove one of them")
        if (shown.context.layout == "text") == self.data.chat:
            wanted = "turns or system" if self.data.chat else "text"
            raise ValueError(
                f"rollout.demonstrations.context.layout '{shown.context.layout}' with data.chat {str(self.data.chat).lower()}: "
                f"expected {wanted}"
            )
        correction = self.algorithm.off_policy_correction
        if self.trains_without_demonstrations and correction.enabled:
            key = "level" if correction.level != "none" else "rejection"
            raise ValueError(
                f"algorithm.off_policy_correction.{key} '{getattr(correction, key)}' compares with the "
                "rollout engine, which reads another context with rollout.demonstrations.train_with 'without_demonstrations': "
                "expected 'none'"
            )
        return self

    @model_validator(mode="after")
    def _check_asynchronous(self) -> Self:
        staleness = self.asynchronous.max_staleness
        if not staleness:
            return self
        if self.run.determinism == "exact":
            raise ValueError(f"async.max_staleness {staleness} cannot repeat bit for bit: set run.determinism to 'fast'")
        if self.rollout.refill_rounds:
            raise ValueError(
                f"async.max_staleness {staleness} samples whole steps ahead, before rollout.refill_rounds "
                f"{self.rollout.refill_rounds} can replace prompts: set one of them to 0"
            )
        if "level" not in self.algorithm.off_policy_correction.model_fields_set and not self.trains_without_demonstrations:
            # As with the critic: a default that follows another section.
            correction = self.algorithm.off_policy_correction.model_copy(update={"level": "token"})
            object.__setattr__(self, "algorithm", self.algorithm.model_copy(update={"off_policy_correction": correction}))
        return self

    @model_validator(mode="after")
    def _check_sleep_mode(self) -> Self:
        if not self.rollout.sleep:
            return self
        if self.rollout.backend != "vllm":
            raise ValueError(f"rollout.sleep needs rollout.backend 'vllm', found '{self.rollout.backend}'")
        if self.asynchronous.max_staleness:
            raise ValueError(
                f"rollout.sleep and async.max_staleness {self.asynchronous.max_staleness}: replicas that sample while the "
                "policy trains cannot sleep; switch one of them off"
            )
        if self.placement.mode == "disaggregated":
            raise ValueError(
                "rollout.sleep has no effect with placement.mode 'disaggregated', where replicas share no devices: remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_device_transfer(self) -> Self:
        transfer, mode = self.rollout.weight_transfer, self.placement.mode
        if transfer in ("auto", "shared_memory"):
            return self
        if self.rollout.backend != "vllm":
            raise ValueError(
                f"rollout.weight_transfer '{transfer}' needs rollout.backend 'vllm', found '{self.rollout.backend}'"
            )
        expected = {"nccl": "disaggregated", "ipc": "colocated"}[transfer]
        if mode != expected:
            raise ValueError(f"rollout.weight_transfer '{transfer}' needs placement.mode '{expected}', found '{mode}'")
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.rollout.lora == "adapter" and self.model.lora is None:
            raise ValueError("rollout.lora 'adapter' needs adapters (model.lora), found full fine-tuning")
        if self.rollout.lora == "adapter" and self.rollout.backend != "vllm":
            raise ValueError(
                f"rollout.lora 'adapter' needs rollout.backend 'vllm', found '{self.rollout.backend}'; expected 'merged'"
            )
        if self.rollout.lora == "adapter" and self.rollout.pipeline_parallel_size > 1:
            raise ValueError(
                f"rollout.lora 'adapter' with rollout.pipeline_parallel_size {self.rollout.pipeline_parallel_size}: an adapter "
                "is read from one node's memory; expected 'merged'"
            )
        return self

    @model_validator(mode="after")
    def _check_overlong_buffer(self) -> Self:
        buffer, longest = self.algorithm.shaping.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > longest:
            raise ValueError(f"algorithm.shaping.overlong_buffer {buffer} is more than rollout.max_new_tokens {longest}")
        return self

    @model_validator(mode="after")
    def _check_lengths_fit(self) -> Self:
        longest, new = self.rollout.max_model_length, self.rollout.max_new_tokens
        prompt = self.data.max_prompt_tokens
        if longest is not None and (prompt or 1) + new > longest:
            wanted = "a prompt" if prompt is None else f"data.max_prompt_tokens {prompt}"
            raise ValueError(f"rollout.max_model_length {longest} cannot hold {wanted} and rollout.max_new_tokens {new}")
        return self

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.recovery.min_replicas > self.rollout.replicas:
            raise ValueError(
                f"recovery.min_replicas {self.recovery.min_replicas} is more than rollout.replicas {self.rollout.replicas}"
            )
        return self

    @model_validator(mode="after")
    def _check_environment_fits(self) -> Self:
        paid = any(function.name == "environment" for function in self.reward.functions)
        if self.environment is None:
            if paid:
                raise ValueError("reward.functions: 'environment' needs the section environment")
            return self
        if self.needs_greedy:
            name = self.algorithm.advantage.estimator
            raise ValueError(
                f"algorithm.advantage.estimator '{name}' needs a greedy sample, which may fail in an environment: "
                "choose another"
            )
        shaping = self.algorithm.shaping
        if paid and self.environment.credit == "turn" and (shaping.scale or shaping.center or shaping.clip is not None):
            raise ValueError(
                "algorithm.shaping.scale, center and clip change whole scores, not those of turns: switch them off, or set "
                "environment.credit to 'episode'"
            )
        return self

    @model_validator(mode="after")
    def _check_record(self) -> Self:
        if self.observe.record != "off" and self.teacher is not None and self.teacher.divergence is not None:
            raise ValueError(
                f"observe.record '{self.observe.record}' cannot hold the teacher's distributions of teacher.divergence; "
                "expected 'off'"
            )
        return self

    @model_validator(mode="after")
    def _check_token_rewards(self) -> Self:
        shaping = self.algorithm.shaping
        within = [f"reward function '{function.name}'" for function in self.reward.functions if function.per != "response"]
        within += ["reward.model.steps"] * self.reward.pays_steps
        if within and (shaping.scale or shaping.center or shaping.clip is not None):
            raise ValueError(
                "algorithm.shaping.scale, center and clip change whole scores, not those of tokens and turns: switch them off, "
                f"or set per to 'response' for {within[0]}"
            )
        if self.reward.pays_steps and self.environment is not None:
            raise ValueError("reward.model.steps.per 'step' pays no steps of turns in an environment; expected 'response'")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        if self.evaluation.every and self.evaluation.enabled and self.data.evaluation is None:
            raise ValueError(f"evaluation.every {self.evaluation.every} needs prompts in data.evaluation")
        return self


def _advantage_method(config: PPOConfig) -> "AdvantageMethod":
    from rayrlhf.algorithms.advantages import advantage_method

    return advantage_method(config.algorithm.advantage.estimator)
