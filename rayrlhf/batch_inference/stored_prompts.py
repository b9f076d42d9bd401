"""Tokenization of stored rows: the same tokens for length checks, generation and likelihoods."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.data.messages import Message
from rayrlhf.data.records import Int32, TokenSequence
from rayrlhf.data.templates import conversation, render
from rayrlhf.library_types import Tokenizer


def whole_prompt(row: Mapping[str, Any]) -> str | list[Message]:
    """Return the prompt of a stored row, with all turns of a conversation."""
    return str(row["prompt"]) if row["messages"] is None else list(json.loads(row["messages"]))


def encode_prompts(
    tokenizer: Tokenizer, section: PairsSection, prompts: Sequence[str], messages: Sequence[str | None], numbers: Sequence[int]
) -> list[Int32]:
    """Return the token ids of each prompt, with the generation prompt.

    Args:
        section: chat template and system prompt settings.
        messages: the conversation as JSON for a conversational prompt, else None.
        numbers: row numbers in the dataset, for error messages.

    Raises:
        UserError: the chat template rejects a conversation.
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
    tokenizer: Tokenizer, prompt_ids: Sequence[Int32], responses: Sequence[str], longest: int
) -> list[TokenSequence]:
    """Return prompt + response as token sequences, truncated to `longest` tokens.

    An empty response becomes the end-of-sequence token.
    """
    encoded = tokenizer(list(responses), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    sequences = []
    for prompt, response in zip(prompt_ids, encoded, strict=True):
        ids = np.asarray(response or [tokenizer.eos_token_id], dtype=np.int32)
        sequences.append(TokenSequence(np.concatenate([prompt, ids])[:longest], len(prompt)))
    return sequences
