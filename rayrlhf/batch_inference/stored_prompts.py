"""From a stored row to what the model reads: the same tokens for the length check, for sampling and for likelihoods."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayrlhf.config.presft import PairsSection
from rayrlhf.data.records import Int32, TokenSequence
from rayrlhf.data.templates import Message, conversation, render


def encode_prompts(
    tokenizer: Any, section: PairsSection, prompts: Sequence[str], messages: Sequence[str | None], numbers: Sequence[int]
) -> list[Int32]:
    """Return the token ids of each prompt, opened for the model's answer.

    Args:
        tokenizer: of the model.
        section: says whether text goes through the chat template, and the system prompt.
        prompts: text of each.
        messages: the conversation as JSON where a prompt is one, else None.
        numbers: row numbers in the dataset, for messages of errors.

    Raises:
        UserError: the chat template refuses a conversation.
    """
    chats: dict[int, list[Message]] = {}
    for index, (prompt, stored) in enumerate(zip(prompts, messages, strict=True)):
        if stored is not None or section.chat:
            chats[index] = conversation(prompt if stored is None else json.loads(stored), section.system_prompt)
    texts = list(prompts)
    places = [f"{section.path}: row {numbers[index]}: {section.prompt_field}" for index in chats]
    for index, text in zip(chats, render(tokenizer, list(chats.values()), places) if chats else [], strict=True):
        texts[index] = text
    result: list[Int32] = [np.empty(0, dtype=np.int32)] * len(texts)
    for templated in (True, False):
        indices = [index for index in range(len(texts)) if (index in chats) == templated]
        if indices:
            chosen = [texts[index] for index in indices]
            batch = tokenizer(chosen, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
            for index, token_ids in zip(indices, batch, strict=True):
                result[index] = np.asarray(token_ids, dtype=np.int32)
    return result


def response_sequences(
    tokenizer: Any, prompt_ids: Sequence[Int32], responses: Sequence[str], longest: int
) -> list[TokenSequence]:
    """Return prompt + response as token sequences, cut to `longest` tokens; a response has at least one token."""
    encoded = tokenizer(list(responses), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    sequences = []
    for prompt, response in zip(prompt_ids, encoded, strict=True):
        ids = np.asarray(response or [tokenizer.eos_token_id], dtype=np.int32)
        sequences.append(TokenSequence(np.concatenate([prompt, ids])[:longest], len(prompt)))
    return sequences
