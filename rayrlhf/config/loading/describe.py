"""Plans of runs in words, for `--dry-run`: models, processes, batches, warnings."""

from collections.abc import Iterator

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rank_groups import shared_parts
from rayrlhf.config.runtime import TrainPlacement
from rayrlhf.config.tuning import DistillationConfig, DPOConfig, RewardTrainingConfig, SFTConfig, TuningConfig


def describe(config: PPOConfig) -> str:
    """Return the plan, one fact per line.

    The lines are folder, models and processes of each role, batch arithmetic, skipped parts and warnings.
    """
    return "\n".join([*_roles(config), *_arithmetic(config), *_skipped(config), *warnings(config)])


def _roles(config: PPOConfig) -> Iterator[str]:
    placement, model = config.placement, config.model
    yield f"run: {config.run.folder}, {config.run.steps} steps, seed {config.run.seed}, {placement.mode}"
    adapters = f", LoRA rank {model.lora.rank}" if model.lora is not None else ""
    yield f"policy: {model.path}{adapters}, {_ranks(placement.policy)}, {config.train.sharding_label}"
    parallel = config.rollout.devices
    wide = f" of {parallel} devices" if parallel > 1 else ""
    yield f"rollout: {config.rollout.backend}, {_count(config.rollout.replicas, 'replica')}{wide}"
    if config.critic.kind == "separate":
        start = (config.critic.model or model).path
        yield f"critic: {start}, {_ranks(placement.critic)}"
    elif config.critic.kind == "shared":
        yield "critic: a head on the policy's trunk"
    if config.reference_in_policy:
        yield "reference: the policy without its adapters"
    elif config.needs_reference:
        yield f"reference: {(config.reference.model or model).path}, {_count(placement.reference.ranks, 'process', 'es')}"
    if config.teacher is not None:
        teacher = config.teacher
        role = _count(placement.teacher.ranks, "process", "es")
        learned = f"log-ratio x {teacher.coefficient:g}, discount {teacher.discount:g}"
        if (part := teacher.divergence) is not None:
            learned = f"divergence of beta {part.beta:g} x {teacher.coefficient:g}, {part.vocabulary} most likely tokens"
            if part.student_share < 1:
                learned += f", own samples in {part.student_share:.0%} of the steps"
        yield f"teacher: {teacher.model.path}, {role}, {learned}"
    parts = [f"{function.name} x {function.weight:g}" for function in config.reward.functions]
    if config.reward.model is not None:
        section = config.reward.model
        names = " & ".join(model.path for model in section.models)
        doubt = f" less {section.uncertainty:g} deviations" if section.uncertainty else ""
        parts.append(f"model {names}{doubt} x {section.weight:g}")
    if parts:
        yield f"reward: {' + '.join(parts)}, {_count(placement.reward.ranks, 'process', 'es')}"
    elif not config.reward.configured:
        yield "reward: given by the loop"
    if (judge := config.reward.judge) is not None:
        role = f"{judge.backend}, {_count(judge.replicas, 'replica')}"
        rubric = f", criteria {', '.join(one.name for one in judge.criteria)}" if judge.criteria else ""
        yield f"judge: {judge.model.path} x {judge.weight:g}, {role}, {judge.mode}, score from {judge.score}{rubric}"


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


def _ranks(placement: TrainPlacement) -> str:
    return _count(placement.ranks, "process", "es") + shared_parts(placement)


def describe_tuning(config: TuningConfig) -> str:
    """Return the plan, one fact per line.

    The lines are folder, model, data, batch arithmetic, workers, kept checkpoints and skipped parts.
    """
    return "\n".join([*_subject(config), *_data(config), *_steps(config), *_kept(config), *_tuning_skipped(config)])


def _subject(config: TuningConfig) -> Iterator[str]:
    model = config.model
    length = f"{config.train.steps} steps" if config.train.steps is not None else _count(config.train.epochs, "epoch")
    yield f"run: {config.run.folder}, {length}, seed {config.run.seed}"
    adapters = f", LoRA rank {model.lora.rank}" if model.lora is not None else ""
    kind = "reward model" if isinstance(config, RewardTrainingConfig) else "policy"
    kind = f"process {kind}" if isinstance(config, RewardTrainingConfig) and config.kind == "process" else kind
    yield f"{kind}: {model.path}{adapters}, {_worker_range(config)}, {config.train.sharding_label}"
    if isinstance(config, SFTConfig):
        noise = f", NEFTune noise {config.train.neftune_alpha:g}" if config.train.neftune_alpha is not None else ""
        if isinstance(config, DistillationConfig):
            most = config.train.vocabulary
            kept = "all tokens" if most == "full" else f"the teacher's {_count(most, 'most likely token')} and the rest as one"
            yield f"loss: forward KL from the teacher per response token, over {kept}{noise}"
        else:
            yield f"loss: cross-entropy per token to learn ({config.data.loss_on}){noise}"
    elif isinstance(config, DPOConfig):
        train = config.train
        if train.loss == "kto":
            weights = f"weights {train.desirable_weight:g} and {train.undesirable_weight:g}"
            yield f"loss: KTO per answer (beta {train.beta:g}, {weights}), reference: the initial model, asked once"
            return
        smoothing = f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else ""
        reference = "the initial model, asked once about all pairs" if train.has_reference else "none"
        added = f" + {train.nll_weight:g} x negative log-likelihood of the chosen" if train.nll_weight else ""
        yield f"loss: DPO per pair ({train.loss}, beta {train.beta:g}{smoothing}){added}, reference: {reference}"
    else:
        weight = config.train.center_coefficient
        yield f"loss: Bradley-Terry per pair{f' + {weight:g} x (chosen + rejected)^2' if weight else ''}"


def _worker_range(config: TuningConfig) -> str:
    fewest, most = config.workers.fewest, config.workers.most
    if fewest != most:
        return f"{fewest} to {most} workers"
    return _count(most, "worker") + shared_parts(config.workers)


def _data(config: TuningConfig) -> Iterator[str]:
    data = config.data
    unit = "samples" if isinstance(config, SFTConfig) else "pairs"
    too_long = {"error": "longer ones are an error", "drop": "longer ones are dropped", "truncate": "longer ones are cut"}
    yield f"data: {unit} of {data.train.path}, at most {data.max_length} tokens, {too_long[data.overlong]}"
    if data.evaluation is not None:
        yield f"held out: {data.evaluation.path}"
    elif data.held_out_share:
        grouped = f", whole groups of {data.train.group_field}" if data.train.group_field is not None else ""
        yield f"held out: {100 * data.held_out_share:g} % of the training rows{grouped}"


def _steps(config: TuningConfig) -> Iterator[str]:
    train = config.train
    unit = "sample" if isinstance(config, SFTConfig) else "pair"
    if train.samples_per_step is not None:
        yield f"an optimizer step: {_count(train.samples_per_step, unit)} over all workers"
    else:
        yield f"an optimizer step: at most {train.batch_tokens} tokens over all workers"
    if train.packing:
        yield f"micro-batches: packs of at most {train.micro_batch_tokens} tokens, without padding"
    elif train.micro_batch_size is not None:
        yield f"micro-batches: {_count(train.micro_batch_size, unit)}"
    else:
        yield f"micro-batches: at most {train.micro_batch_tokens} tokens with padding"


def _kept(config: TuningConfig) -> Iterator[str]:
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if config.has_evaluation:
        often = f", every {evaluation.every} steps" if evaluation.every else ""
        amount = f"the first {evaluation.rows} of what is held out" if evaluation.rows else "all that is held out"
        yield f"evaluation: {amount}, before{often} and after"
    often = f"every {checkpoint.every} steps and " if checkpoint.every else ""
    yield f"checkpoints: {often}at the end, the last {checkpoint.keep} kept"
    best = f"the best by held-out {checkpoint.best_metric}" if checkpoint.best_metric else "the last weights"
    checked = isinstance(config, RewardTrainingConfig) and not config.export_anyway
    unless = ", unless not better than chance" if checked else ""
    yield f"export: {best}{unless}"


def _tuning_skipped(config: TuningConfig) -> Iterator[str]:
    if not config.has_evaluation:
        yield "skipped: evaluation, because neither data.evaluation nor data.evaluation_share is given"
    elif isinstance(config, SFTConfig) and not config.evaluation.generations:
        yield "skipped: sampled answers, because evaluation.generations is 0"
