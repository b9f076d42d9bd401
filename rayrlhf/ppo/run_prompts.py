"""Training and held-out prompts of a run, tokenized, and prompts of a chat."""

from collections.abc import Sequence

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.messages import Message
from rayrlhf.data.prompt_datasets import load_prompt_dataset
from rayrlhf.data.records import Int32, Prompt
from rayrlhf.data.templates import check_messages, conversation, render, require_chat_template
from rayrlhf.demonstrations.prompt_demonstrations import PromptDemonstrations
from rayrlhf.engines.rollout.common import check_room, trained_context
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.models.start_check import check_tokens
from rayrlhf.rewards.functions import load_functions, required_columns
from rayrlhf.rewards.judgments import check_judge_columns, judge_columns


def load_prompts(config: PPOConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Return the training prompts and the fixed held-out prompts, tokenized.

    Raises:
        UserError: a mistake in a file, row, field, template or prompt length.
    """
    tokenizer = load_tokenizer(config.model)
    longest = max_prompt_tokens(config)
    shown = config.rollout.demonstrations
    demonstrator = PromptDemonstrations(shown, config.data, tokenizer, longest, config.run.seed) if shown is not None else None
    needs = required_columns(load_functions(config.reward)) | judge_columns(config.reward.judge)
    train = load_prompt_dataset(config.data.train, config.data, tokenizer, longest, needs)
    check_judge_columns(config.reward.judge, train)
    if demonstrator is not None:
        train = demonstrator.show(config.data.train, train)
    check_tokens(config.model, tokenizer, (prompt.token_ids for prompt in train))
    if config.data.evaluation is None or not config.evaluation.enabled:
        return train, []
    held_out = load_prompt_dataset(config.data.evaluation, config.data, tokenizer, longest, needs)[: config.evaluation.prompts]
    check_judge_columns(config.reward.judge, held_out)
    if demonstrator is not None and not config.trains_without_demonstrations:
        held_out = demonstrator.show(config.data.evaluation, held_out)
    check_tokens(config.model, tokenizer, (prompt.token_ids for prompt in held_out))
    return train, held_out


def max_prompt_tokens(config: PPOConfig) -> int:
    """Return the length of the longest prompt that leaves tokens for a response.

    Raises:
        UserError: prompt and response exceed the model's context.
    """
    context = trained_context(config.rollout, load_architecture(config.model))
    longest = config.data.max_prompt_tokens or context - config.rollout.max_new_tokens
    check_room(context, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    return longest


def chat_prompt_ids(config: PPOConfig, prompt: str | Sequence[Message]) -> Int32:
    """Tokenize a prompt as the run does: chat template and system prompt, or plain text.

    Args:
        config: of the run.
        prompt: text, or {role, content} messages that end with the user's.

    Returns:
        int32 [P].

    Raises:
        UserError: empty or too long, or messages that the chat template does not accept.
    """
    tokenizer, longest = load_tokenizer(config.model), max_prompt_tokens(config)
    if isinstance(prompt, str) and not config.data.chat:
        ids = tokenizer(prompt)["input_ids"]
    else:
        require_chat_template(tokenizer)
        turns = conversation(prompt if isinstance(prompt, str) else check_messages(prompt, "chat"), config.data.system_prompt)
        ids = tokenizer(render(tokenizer, [turns], ["chat"])[0], add_special_tokens=False)["input_ids"]
    if not 1 <= len(ids) <= longest:
        raise UserError(f"chat: the prompt has {len(ids)} tokens, expected 1 to {longest} (data.max_prompt_tokens)")
    return np.asarray(ids, dtype=np.int32)
