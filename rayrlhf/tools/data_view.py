"""Rendered rows of a configuration's data, with the loss in color (`rayrlhf data`)."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import Section
from rayrlhf.config.tuning import DPOConfig, RewardTrainingConfig, SFTConfig
from rayrlhf.data.records import Bool, Int32
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "reward": RewardTrainingConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
LOSS, REST = "bold green", "dim"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="UTF-8"><meta name="viewport" content="width=device-width"><title>rayrlhf data</title></head>
<body style="color:{foreground};background:{background}"><pre style="white-space:pre-wrap">{code}</pre></body>
</html>
"""
"""Page around the exported text, for rich's `export_html`."""
OPEN, CLOSE = "⟦", "⟧"
"""Marks around the tokens of the loss where there is no color."""


def data_lines(path: Path, overrides: list[str], task: str | None, rows: int, *, color: bool) -> "Iterator[Text]":
    """Yield counts, format, lengths and the first samples of a configuration's training data.

    Args:
        path: the configuration file.
        overrides: settings that replace those of the file.
        task: one of `TASKS`; None is the first that the file fits.
        rows: samples to show.
        color: False marks the loss by brackets instead.

    Raises:
        UserError: an invalid configuration or data.
    """
    if task is not None and task not in TASKS:
        raise UserError(f"--task {task}: expected one of {', '.join(TASKS)}")
    error: UserError | None = None
    for name in TASKS if task is None else (task,):
        try:
            return _shown(load_config(TASKS[name], path, overrides), rows, color=color)
        except UserError as found:
            # A file may fit several tasks; the rows decide between samples and pairs.
            if error is None or "preference pairs" in str(error):
                error = found
    raise error if error is not None else UserError(f"{path}: no task fits")


def _shown(config: Any, rows: int, *, color: bool) -> "Iterator[Text]":
    from rayrlhf.models.load import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if isinstance(config, PPOConfig | EvaluateConfig):
        return _prompts(config, tokenizer, rows)
    return _samples(config, tokenizer, rows, color=color)


def _prompts(config: "PPOConfig | EvaluateConfig", tokenizer: "PreTrainedTokenizerBase", rows: int) -> "Iterator[Text]":
    from rich.text import Text

    from rayrlhf.data.prompt_datasets import describe_columns
    from rayrlhf.pipelines.evaluation.evaluate_model import load_evaluation_prompts
    from rayrlhf.ppo.run_prompts import load_prompts
    from rayrlhf.rewards.functions import load_functions
    from rayrlhf.rewards.judgments import columns_read

    functions = load_functions(config.reward)
    if isinstance(config, PPOConfig):
        prompts, held_out = load_prompts(config)
        section, counts = config.data.train, f"prompts: {len(prompts)} to train on, {len(held_out)} held out"
    else:
        prompts = load_evaluation_prompts(config, functions)
        section, counts = config.data, f"prompts: {len(prompts)} of {config.data.path}"
    read = None if config.environment is not None else columns_read(config.reward, functions)
    lines = [describe_columns(section, prompts, read), counts]
    lines.append(_lengths([len(prompt.token_ids) for prompt in prompts]))
    shown = [Text(f"\nrow {prompt.id + 1}\n").append(tokenizer.decode(prompt.token_ids), REST) for prompt in prompts[:rows]]
    return iter([*map(Text, lines), *shown])


def _samples(config: Any, tokenizer: "PreTrainedTokenizerBase", rows: int, *, color: bool) -> "Iterator[Text]":
    from rich.text import Text

    from rayrlhf.data.supervised.datasets import load_preference_data, load_step_data, load_supervised_data

    steps = isinstance(config, RewardTrainingConfig) and config.kind == "process"
    pairs = not isinstance(config, SFTConfig) and not steps
    labels = isinstance(config, DPOConfig) and config.train.loss == "kto"
    if steps:
        dataset: Any = load_step_data(config.data, tokenizer)[0]
    elif pairs:
        dataset = load_preference_data(config.data, tokenizer, labels=labels)[0]
    else:
        dataset = load_supervised_data(config.data, tokenizer)[0]
    parts = [part for one in dataset.samples for part in (one.answers if pairs else (one,))]
    lines = [*dataset.report.lines(), _lengths([len(part.token_ids) for part in parts])]
    written = partial(masked_text, tokenizer, color=color)
    shown = []
    for one in dataset.samples[:rows]:
        named = (("chosen", one.chosen), ("rejected", one.rejected)) if pairs else (("", one),)
        if pairs and one.label is not None:
            named = ((f"label {str(one.label).lower()}", one.chosen),)
        for name, part in named:
            shown.append(Text(f"\nrow {one.row}{f', {name}' if name else ''}\n") + written(part.token_ids, part.loss_mask))
    return iter([*map(Text, lines), *shown])


def masked_text(tokenizer: "PreTrainedTokenizerBase", token_ids: Int32, mask: Bool, *, color: bool) -> "Text":
    """Return the text of tokens, with those of the loss in another style.

    Args:
        tokenizer: of the model.
        token_ids: int32 [L].
        mask: bool [L], True on the loss.
        color: False puts the loss in brackets.
    """
    from rich.text import Text

    text = Text()
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(token_ids)]
    for start, end in pairwise(edges):
        words, inside = str(tokenizer.decode(token_ids[start:end])), bool(mask[start])
        text.append(f"{OPEN}{words}{CLOSE}" if inside and not color else words, LOSS if inside else REST)
    return text


def _lengths(lengths: Sequence[int]) -> str:
    return f"tokens of a sequence: least {min(lengths)}, median {int(np.median(lengths))}, most {max(lengths)}"


def show_data(path: Path, overrides: list[str], task: str | None, rows: int, page: Path | None) -> None:
    """Print `data_lines`, and write them as a page that opens offline."""
    from rich.console import Console

    console = Console(record=page is not None, soft_wrap=True, highlight=False)
    color = console.is_terminal or page is not None
    for line in data_lines(path, overrides, task, rows, color=color):
        console.print(line)
    if page is not None:
        from rayrlhf.storage.atomic import write_atomically

        write_atomically(page, console.export_html(inline_styles=True, code_format=PAGE))
