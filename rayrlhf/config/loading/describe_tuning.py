"""Plan of an SFT, reward-model or DPO run in words, for `--dry-run`."""

from collections.abc import Iterator

from rayrlhf.config.tuning.configs import DistillationConfig, DPOConfig, RewardTrainingConfig, SFTConfig, TuningConfig


def describe_tuning(config: TuningConfig) -> str:
    """Return the plan, one fact per line.

    The lines are folder, model, data, batch arithmetic, workers, kept checkpoints and skipped parts.
    """
    return "\n".join([*_subject(config), *_data(config), *_steps(config), *_kept(config), *_skipped(config)])


def _subject(config: TuningConfig) -> Iterator[str]:
    model = config.model
    length = f"{config.train.steps} steps" if config.train.steps is not None else _count(config.train.epochs, "epoch")
    yield f"run: {config.run.folder}, {length}, seed {config.run.seed}"
    adapters = f", LoRA rank {model.lora.rank}" if model.lora is not None else ""
    kind = "reward model" if isinstance(config, RewardTrainingConfig) else "policy"
    yield f"{kind}: {model.path}{adapters}, {_workers(config)}, {config.train.sharding_label}"
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
        smoothing = f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else ""
        reference = "the initial model, asked once about all pairs" if train.reference == "initial" else "none"
        yield f"loss: DPO per pair ({train.loss}, beta {train.beta:g}{smoothing}), reference: {reference}"
    else:
        weight = config.train.center_coefficient
        yield f"loss: Bradley-Terry per pair{f' + {weight:g} x (chosen + rejected)^2' if weight else ''}"


def _workers(config: TuningConfig) -> str:
    fewest, most = config.workers.fewest, config.workers.most
    return _count(most, "worker") if fewest == most else f"{fewest} to {most} workers"


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
    unless = ", unless not better than chance" if isinstance(config, RewardTrainingConfig) and not config.export_anyway else ""
    yield f"export: {best}{unless}"


def _skipped(config: TuningConfig) -> Iterator[str]:
    if not config.has_evaluation:
        yield "skipped: evaluation, because neither data.evaluation nor data.evaluation_share is given"
    elif isinstance(config, SFTConfig) and not config.evaluation.generations:
        yield "skipped: sampled answers, because evaluation.generations is 0"


def _count(count: int, word: str) -> str:
    return f"{count} {word if count == 1 else word + 's'}"
