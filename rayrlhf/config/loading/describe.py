"""Plan of a run in words, for `--dry-run`: roles, steps, skipped parts and warnings."""

from collections.abc import Iterator

from rayrlhf.config.ppo import PPOConfig


def describe(config: PPOConfig) -> str:
    """Return the plan, one fact per line.

    The lines are folder, models and processes of each role, batch arithmetic, skipped parts and warnings.
    """
    return "\n".join([*_roles(config), *_arithmetic(config), *_skipped(config), *warnings(config)])


def _roles(config: PPOConfig) -> Iterator[str]:
    placement, model = config.placement, config.model
    yield f"run: {config.run.folder}, {config.run.steps} steps, seed {config.run.seed}, {placement.mode}"
    adapters = f", LoRA rank {model.lora.rank}" if model.lora is not None else ""
    yield f"policy: {model.path}{adapters}, {_count(placement.policy.ranks, 'process')}, {config.train.sharding_label}"
    parallel = config.rollout.tensor_parallel_size
    wide = f" of {parallel} devices" if parallel > 1 else ""
    yield f"rollout: {config.rollout.backend}, {_count(config.rollout.replicas, 'replica')}{wide}"
    if config.critic.kind == "separate":
        start = (config.critic.model or model).path
        yield f"critic: {start}, {_count(placement.critic.ranks, 'process')}"
    elif config.critic.kind == "shared":
        yield "critic: a head on the policy's trunk"
    if config.reference_in_policy:
        yield "reference: the policy without its adapters"
    elif config.needs_reference:
        yield f"reference: {(config.reference.model or model).path}, {_count(placement.reference.ranks, 'process')}"
    parts = [f"{function.name} x {function.weight:g}" for function in config.reward.functions]
    if config.reward.model is not None:
        section = config.reward.model
        names = " & ".join(model.path for model in section.models)
        doubt = f" less {section.uncertainty:g} deviations" if section.uncertainty else ""
        parts.append(f"model {names}{doubt} x {section.weight:g}")
    yield f"reward: {' + '.join(parts)}, {_count(placement.reward.ranks, 'process')}" if parts else "reward: given by the loop"


def _arithmetic(config: PPOConfig) -> Iterator[str]:
    rollout, train = config.rollout, config.train
    updates = config.updates_per_step
    yield (
        f"a step: {_count(rollout.prompts_per_step, 'prompt')} x {_count(rollout.samples_per_prompt, 'response')} = "
        f"{config.samples_per_step} samples of at most {rollout.max_new_tokens} new tokens, temperature {rollout.temperature:g}"
    )
    ahead = config.asynchronous
    if ahead.max_staleness:
        fate = "continue with" if ahead.on_update == "continue" else "restart with"
        yield (
            f"sampling: up to {_count(ahead.max_staleness, 'step')} ahead of training; unfinished responses {fate} new "
            f"weights, importance weights: {config.algorithm.off_policy_correction.level}"
        )
    if rollout.sleep:
        yield "sampling: replicas release their GPU memory while models train"
    mini_batches = config.samples_per_step // config.mini_batch_size
    yield (
        f"its updates: {_count(train.epochs, 'epoch')} x {_count(mini_batches, 'mini-batch', 'es')} "
        f"of {_count(config.mini_batch_size, 'sample')} = {_count(updates, 'optimizer step')}; "
        f"{updates * config.run.steps} in the whole run"
    )
    if train.micro_batch_size is not None:
        yield f"micro-batches: {train.micro_batch_size} samples"
    else:
        yield f"micro-batches: at most {train.micro_batch_tokens} tokens with padding"
    if config.data.evaluation is not None and config.evaluation.enabled:
        often = f", every {config.evaluation.every} steps" if config.evaluation.every else ""
        yield f"evaluation: {config.evaluation.prompts} prompts of {config.data.evaluation.path}, before{often} and after"


def _skipped(config: PPOConfig) -> Iterator[str]:
    if not config.needs_reference:
        yield "skipped: the reference model, because algorithm.kl.coefficient is 0"
    elif config.reference_in_policy:
        yield "skipped: a reference model of its own, because the policy has LoRA adapters that can be switched off"
    if config.critic.kind == "none":
        yield "skipped: the critic, because critic.kind is none"
    if config.old_logprobs == "skipped":
        yield "skipped: the policy's old log-probs, because one optimizer step per step makes their ratio 1"
    elif config.old_logprobs == "rollout":
        yield "skipped: the policy's old log-probs, because algorithm.old_logprobs is rollout"
    if config.data.evaluation is None:
        yield "skipped: evaluation, because data.evaluation is not given"
    elif not config.evaluation.enabled:
        yield "skipped: evaluation, because evaluation.enabled is false"


def warnings(config: PPOConfig) -> Iterator[str]:
    """Yield one line per setting that is valid but almost certainly a mistake."""
    if config.algorithm.policy_loss.clip_warning is not None:
        yield f"warning: {config.algorithm.policy_loss.clip_warning}"


def _count(count: int, word: str, ending: str = "s") -> str:
    return f"{count} {word if count == 1 else word + ending}"
