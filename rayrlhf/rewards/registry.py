"""Reward function registry: built-in names, and those of users' own files."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rayrlhf.plugins import Registry, import_file

RewardFunction = Callable[..., Any]
"""See `rayrlhf.rewards.functions` for the arguments and the return value."""

REWARD_FUNCTIONS: Registry[RewardFunction] = Registry(
    "reward function",
    {
        "code": "rayrlhf.rewards.programs:code",
        "environment": "rayrlhf.rewards.rollout_rewards:environment",
        "format": "rayrlhf.rewards.formats:matches_format",
        "gsm8k": "rayrlhf.rewards.gsm8k:gsm8k",
        "json_schema": "rayrlhf.rewards.formats:matches_json_schema",
        "judge": "rayrlhf.rewards.judge:judge",
        "length": "rayrlhf.rewards.rollout_rewards:length_penalty",
        "math_verify": "rayrlhf.rewards.math_verify:math_verify",
        "remote": "rayrlhf.rewards.remote:remote",
        "word_problems": "rayrlhf.rewards.toy_word_problems:word_problems",
        "worked_answer": "rayrlhf.rewards.toy_word_problems:worked_answer",
        "worked_answer_exact": "rayrlhf.rewards.toy_word_problems:worked_answer_exact",
        "word_problems_exact": "rayrlhf.rewards.toy_word_problems:word_problems_exact",
    },
)

register = REWARD_FUNCTIONS.register
resolve = REWARD_FUNCTIONS.resolve


def import_files(files: Iterable[Path]) -> None:
    """Import the Python files of `reward.files`, which may register functions of their own.

    Raises:
        UserError: a file is missing or raises when imported.
    """
    for file in files:
        import_file(file, "reward.files")
