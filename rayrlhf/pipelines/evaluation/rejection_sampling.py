"""Rejection sampling: the best answers that an evaluation found, as rows that `rayrlhf sft` learns from.

Best-of-n answers above a bar, learned as if a person had written them (RFT, Yuan et al. 2023, arXiv 2308.01825; the rejection
sampling of Llama 2, Touvron et al. 2023). An answer that was cut off is never kept: learning it would teach not to stop.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.config.evaluate import EvaluateDataSection, KeepSection
from rayrlhf.data.records import Float32, Prompt, Rollout
from rayrlhf.data.templates import Message, conversation
from rayrlhf.errors import UserError

KEPT = "kept.jsonl"
"""Name of the file in the evaluation's folder."""


def choose_answers(
    prompts: Sequence[int], texts: Sequence[str], whole: Sequence[bool], scores: Float32, keep: KeepSection
) -> list[int]:
    """Return which answers are kept, in their order.

    Args:
        prompts: B ids; answers to one prompt compete.
        texts: B answers; the same text is kept once a prompt, and an empty one never.
        whole: B; False where an answer was cut off.
        scores: float32 [B].
        keep: the bar, and how many of a prompt pass at most: the best, of equals the earlier.
    """
    places: dict[int, int] = {}
    seen: set[tuple[int, str]] = set()
    kept = []
    for index in np.argsort(-scores, kind="stable").tolist():
        prompt, text = prompts[index], texts[index].strip()
        fits = whole[index] and text and scores[index] >= keep.at_least and (prompt, text) not in seen
        if fits and places.get(prompt, 0) < keep.per_prompt:
            places[prompt] = places.get(prompt, 0) + 1
            seen.add((prompt, text))
            kept.append(index)
    return sorted(kept)


def kept_rows(
    asked: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    scores: Float32,
    keep: KeepSection,
    written: Mapping[int, str | list[Message]],
    data: EvaluateDataSection,
) -> list[dict[str, Any]]:
    """Rows {prompt, completion} of what is kept: texts, or messages where the model was asked in a chat.

    Args:
        asked: the prompt of each rollout.
        rollouts: B answers.
        scores: float32 [B].
        keep: see `choose_answers`.
        written: prompt id -> the prompt as it stands in the data, with all of its turns.
        data: whether it went through the chat template, and with which system prompt.

    Raises:
        UserError: nothing is kept.
    """
    texts = [rollout.text for rollout in rollouts]
    whole = [rollout.finish_reason == "stop" for rollout in rollouts]
    chosen = choose_answers([prompt.id for prompt in asked], texts, whole, scores, keep)
    if not chosen:
        raise UserError(
            f"keep.at_least {keep.at_least:g}: no answer that ended by itself scored as much; the best of all {len(texts)} "
            f"answers has {scores.max():g}, and {sum(whole)} ended by themselves"
        )
    return [_row(written[asked[index].id], texts[index], data) for index in chosen]


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(prompt: str | list[Message], text: str, data: EvaluateDataSection) -> dict[str, Any]:
    if isinstance(prompt, str) and not data.chat:
        return {"prompt": prompt, "completion": text}
    return {"prompt": conversation(prompt, data.system_prompt), "completion": [{"role": "assistant", "content": text}]}
