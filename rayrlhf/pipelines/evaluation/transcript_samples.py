"""Answers of several turns in an evaluation: what failed is left out and told, and who said what is kept.

A sample whose environment failed is no answer, neither a right nor a wrong one. Its whole prompt is left out, so that every
prompt that counts has equally many answers.
"""

from collections.abc import Sequence

from rayrlhf.config.evaluate import EvaluateConfig
from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.environments.episodes import without_failed
from rayrlhf.environments.transcript import transcript_lines
from rayrlhf.errors import AlarmError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.samples import Line


def whole_prompts(config: EvaluateConfig, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Prompt]:
    """Return the prompts all of whose samples were played; all of them where there is no environment.

    Args:
        config: names the share of samples that may fail.
        prompts: P of them.
        rollouts: P x samples, in any order.

    Raises:
        AlarmError: too many failed, or no prompt is left.
    """
    if config.environment is None:
        return list(prompts)
    list(without_failed([list(rollouts)], len(rollouts), config.environment.max_failed_share))  # raises above the share
    reasons = {rollout.key.prompt: rollout.failure for rollout in rollouts if rollout.failure}
    kept = [prompt for prompt in prompts if prompt.id not in reasons]
    if not kept:
        raise AlarmError(f"a sample of every prompt failed in its environment; the first: {next(iter(reasons.values()))}")
    return kept


def transcripts(config: EvaluateConfig, rollouts: Sequence[Rollout]) -> list[list[Line] | None]:
    """Return who said what in each rollout; None for each where there is no environment."""
    if config.environment is None:
        return [None] * len(rollouts)
    tokenizer = load_tokenizer(config.model)
    return [transcript_lines(rollout, tokenizer) for rollout in rollouts]
