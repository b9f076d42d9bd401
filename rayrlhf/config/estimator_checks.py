"""Checks that an advantage estimator has the inputs that it reads."""

from typing import TYPE_CHECKING

from rayrlhf.config.policy_loss import PPOLossSection

if TYPE_CHECKING:
    from rayrlhf.algorithms.estimator import AdvantageMethod
    from rayrlhf.config.ppo import PPOConfig


def check_estimator_inputs(config: "PPOConfig", method: "AdvantageMethod") -> None:
    """Check teacher and rewards of a configuration against its estimator.

    Raises:
        ValueError: the estimator needs a teacher, or settings shape scores that it does not read.
    """
    name, shaping, kl = config.algorithm.advantage.estimator, config.algorithm.shaping, config.algorithm.kl
    if method.teacher and config.teacher is None:
        raise ValueError(f"algorithm.advantage.estimator '{name}' needs a teacher: set teacher.model.path")
    if config.teacher is not None and config.trains_without_demonstrations:
        raise ValueError(
            "teacher: it reads the prompts that are trained on, without rollout.demonstrations: remove one of them"
        )
    if config.critic.pretrain_steps and name != "gae":
        raise ValueError(f"critic.pretrain_steps sets GAE's lambda: not possible with algorithm.advantage.estimator '{name}'")
    check_given_responses(config, method)
    check_judged_groups(config)
    check_online_dpo(config, method)
    if not method.parts:
        return
    unread = {
        "reward.given_by_loop": config.reward.given_by_loop,
        "environment": config.environment is not None,
        "algorithm.kl.placement 'reward'": kl.coefficient > 0 and kl.placement == "reward",
        **{
            f"algorithm.shaping.{key}": getattr(shaping, key) not in (None, False)
            for key in ("overlong_buffer", "missing_eos_penalty", "scale", "center", "clip", "whiten_rewards")
        },
    }
    found = [key for key, given in unread.items() if given]
    if found:
        raise ValueError(
            f"algorithm.advantage.estimator '{name}' reads the values of reward.functions, reward.model and reward.judge, "
            f"and not {', '.join(found)}: remove it, or choose another estimator"
        )


def check_judged_groups(config: "PPOConfig") -> None:
    """Check that a judge that compares responses gets several to each prompt.

    Raises:
        ValueError: it would get a single one, more than it has letters for, or segments of an environment.
    """
    judge = config.reward.judge
    if judge is None or judge.mode == "pointwise":
        return
    single = {
        "rollout.samples_per_prompt is 1": config.rollout.samples_per_prompt == 1,
        "evaluations have one": config.evaluation.enabled and config.data.evaluation is not None,
        f"algorithm.advantage.estimator '{config.algorithm.advantage.estimator}' scores a greedy one": config.needs_greedy,
    }
    if config.environment is not None:
        raise ValueError(
            f"reward.judge.mode '{judge.mode}' cannot compare the segments of an environment: set it to 'pointwise'"
        )
    found = [reason for reason, given in single.items() if given]
    if found and judge.against is None:
        raise ValueError(
            f"reward.judge.mode '{judge.mode}' compares responses to one prompt, but {found[0]}: set reward.judge.against to a "
            "column with a response, mode to 'pointwise', or evaluation.enabled to false"
        )
    judge.check_letters(config.rollout.samples_per_prompt, "rollout.samples_per_prompt")


def check_given_responses(config: "PPOConfig", method: "AdvantageMethod") -> None:
    """Check that nothing but the teacher learns from responses of the dataset.

    Raises:
        ValueError: rewards, a KL penalty, an environment or steps that are sampled ahead would.
    """
    divergence = config.teacher.divergence if config.teacher is not None else None
    if divergence is None or divergence.student_share == 1:
        return
    unfit = {
        f"algorithm.advantage.estimator '{config.algorithm.advantage.estimator}'": not method.teacher,
        "algorithm.kl.coefficient above 0": config.algorithm.kl.coefficient > 0,
        "async.max_staleness above 0": config.asynchronous.max_staleness > 0,
        "algorithm.old_logprobs 'rollout'": config.algorithm.old_logprobs == "rollout",
        "an environment": config.environment is not None,
    }
    for setting, found in unfit.items():
        if found:
            raise ValueError(
                f"teacher.divergence.student_share {divergence.student_share:g} takes responses of the dataset, which is not "
                f"possible with {setting}; expected estimator 'distillation', no KL, no environment, synchronous steps and "
                "old_logprobs 'auto'"
            )


def check_online_dpo(config: "PPOConfig", method: "AdvantageMethod") -> None:
    """Check that a loss of pairs has its estimator and no unread settings.

    Raises:
        ValueError: it has not.
    """
    algorithm, train = config.algorithm, config.train
    if algorithm.online_dpo is None:
        if method.pairs:
            name = algorithm.advantage.estimator
            raise ValueError(f"algorithm.advantage.estimator '{name}' needs the section algorithm.online_dpo")
        return
    parity = algorithm.parity
    unread = {
        f"algorithm.advantage.estimator '{algorithm.advantage.estimator}'": not method.pairs,
        "algorithm.policy_loss": algorithm.policy_loss != PPOLossSection(),
        "algorithm.kl.coefficient above 0": algorithm.kl.coefficient > 0,
        "algorithm.off_policy_correction": algorithm.off_policy_correction.enabled,
        "algorithm.parity": parity.mini_batch_means or parity.no_accumulation,
        "async.max_staleness above 0": config.asynchronous.max_staleness > 0,
        "train.early_stop_kl": train.early_stop_kl is not None,
        "train.ratio_guard": train.ratio_guard is not None,
        "teacher": config.teacher is not None,
        "environment": config.environment is not None,
    }
    for setting, found in unread.items():
        if found:
            raise ValueError(
                f"algorithm.online_dpo: {setting} has no effect on its pairs; expected estimator 'pairs' without it"
            )
    if config.mini_batch_size % 2:
        raise ValueError(
            f"train.mini_batch_size {config.mini_batch_size} would split a pair of algorithm.online_dpo; expected an even one"
        )
    if config.opponent_share:
        _check_opponent(config, algorithm.online_dpo.variant)


def _check_opponent(config: "PPOConfig", variant: str) -> None:
    """Check that each second sample can come from an opponent of the policy.

    Raises:
        ValueError: it cannot.
    """
    rollout = config.rollout
    unfit = {
        f"rollout.backend '{rollout.backend}'": (rollout.backend != "transformers", "'transformers', which samples from it"),
        f"rollout.samples_per_prompt {rollout.samples_per_prompt}": (bool(rollout.samples_per_prompt % 2), "an even number"),
        "rollout.refill_rounds": (rollout.refill_rounds > 0, "0"),
        "rollout.demonstrations": (rollout.demonstrations is not None, "none"),
        f"observe.record '{config.observe.record}'": (config.observe.record != "off", "'off'"),
    }
    for setting, (found, wanted) in unfit.items():
        if found:
            raise ValueError(
                f"algorithm.online_dpo.variant '{variant}' samples from its opponent too: {setting}, expected {wanted}"
            )
