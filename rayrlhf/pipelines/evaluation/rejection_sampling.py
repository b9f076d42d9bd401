"""Rejection sampling: the best responses of an evaluation as rows for `rayrlhf sft`.

The best of n responses above a minimum score become supervised targets (RFT, Yuan et al. 2023, arXiv 2308.01825; the rejection
sampling of Llama 2, Touvron et al. 2023). Truncated responses are excluded, because they would teach the model not to stop.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.config.pipelines import EvaluateDataSection, KeepSection
from rayrlhf.data.messages import Message
from rayrlhf.data.records import Float32, Prompt, Rollout
from rayrlhf.data.templates import conversation
from rayrlhf.errors import UserError

KEPT = "kept.jsonl"
"""File name in the evaluation's folder."""


def choose_answers(
    prompts: Sequence[int], texts: Sequence[str], whole: Sequence[bool], scores: Float32, keep: KeepSection
) -> list[int]:
    """Return the indices of kept responses, ascending.

    Args:
        prompts: B ids; responses to the same prompt compete.
        texts: B responses; equal texts are kept once per prompt, empty ones never.
        whole: B; False for a truncated response.
        scores: float32 [B].
        keep: minimum score, and the maximum per prompt: the best ones, ties to the earlier.
    """
    counts: dict[int, int] = {}
    seen: set[tuple[int, str]] = set()
    kept = []
    for index in np.argsort(-scores, kind="stable").tolist():
        prompt, text = prompts[index], texts[index].strip()
        fits = whole[index] and text and scores[index] >= keep.at_least and (prompt, text) not in seen
        if fits and counts.get(prompt, 0) < keep.per_prompt:
            counts[prompt] = counts.get(prompt, 0) + 1
            seen.add((prompt, text))
            kept.append(index)
    return sorted(kept)


def kept_rows(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    scores: Float32,
    keep: KeepSection,
    written: Mapping[int, str | list[Message]],
    data: EvaluateDataSection,
) -> list[dict[str, Any]]:
    """Return rows {prompt, completion}: texts, or messages for chat prompts.

    Args:
        scores: float32 [B].
        keep: see `choose_answers`.
        written: prompt id -> the prompt in the dataset, with all of its turns.
        data: chat template and system prompt settings.

    Raises:
        UserError: no response is kept.
    """
    texts = [rollout.text for rollout in rollouts]
    whole = [rollout.finish_reason == "stop" for rollout in rollouts]
    chosen = choose_answers([prompt.id for prompt in prompts], texts, whole, scores, keep)
    if not chosen:
        raise UserError(
            f"keep.at_least {keep.at_least:g}: no complete answer has this score; the best of all {len(texts)} answers has "
            f"{scores.max():g}, and {sum(whole)} are complete"
        )
    return [_row(written[prompts[index].id], texts[index], data) for index in chosen]


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(prompt: str | list[Message], text: str, data: EvaluateDataSection) -> dict[str, Any]:
    if isinstance(prompt, str) and not data.chat:
        return {"prompt": prompt, "completion": text}
    return {"prompt": conversation(prompt, data.system_prompt), "completion": [{"role": "assistant", "content": text}]}
