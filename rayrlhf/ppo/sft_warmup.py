"""SFT warm-up before PPO: the given responses as a training batch, and its plan."""

from collections.abc import Sequence

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.rollout.common import stop_token_ids
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer


def check_warmup(config: PPOConfig, prompts: Sequence[Prompt]) -> None:
    """Check that every training prompt has a given response.

    Raises:
        UserError: one has none; the message has the row and its columns.
    """
    if config.sft_warmup is None:
        return
    field = config.sft_warmup.response_field
    for prompt in prompts:
        if not isinstance(prompt.columns.get(field), str) or not prompt.columns[field]:
            columns = ", ".join(sorted(prompt.columns)) or "none"
            raise UserError(
                f"sft_warmup.response_field {field!r}: row {prompt.id + 1} of {config.data.train.path} has no text there; "
                f"its columns are: {columns}"
            )


def sft_warmup_batch(config: PPOConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> TrainingBatch:
    """Return the first `sft_warmup.samples` shuffled prompts with their responses and a stop token."""
    warmup = config.sft_warmup
    if warmup is None:
        raise ValueError("the configuration has no sft_warmup")
    order = np.random.default_rng(config.run.seed).permutation(len(prompts))[: warmup.samples]
    stop = _stop_token(config, tokenizer)
    sequences = []
    for index in order:
        prompt = prompts[index]
        response = tokenizer(prompt.columns[warmup.response_field], add_special_tokens=False)["input_ids"]
        ids = np.asarray([*response, stop][: config.rollout.max_new_tokens], dtype=np.int32)
        sequences.append(TokenSequence(np.concatenate([prompt.token_ids, ids]), len(prompt.token_ids)))
    lengths = np.array([sequence.response_length for sequence in sequences])
    return TrainingBatch(sequences, {"action_mask": np.arange(lengths.max()) < lengths[:, None]})


def sft_warmup_plan(config: PPOConfig, samples: int) -> UpdatePlan:
    """Return one pass in order, in optimizer steps of `sft_warmup.mini_batch_size`."""
    size = config.sft_warmup.mini_batch_size if config.sft_warmup else samples
    return UpdatePlan([[list(range(start, min(start + size, samples))) for start in range(0, samples, size)]])


def _stop_token(config: PPOConfig, tokenizer: Tokenizer) -> int:
    """Return the token that ends a response: the tokenizer's own if generation stops at it."""
    stops = stop_token_ids(config.model, tokenizer)
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id in stops else stops[0]
