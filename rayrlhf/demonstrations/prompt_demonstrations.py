"""Demonstrations before PPO prompts, selected once per run.

The rollout engine reads them. The trained models read the same or the prompt without demonstrations (`train_with`). A prompt is
never its own demonstration, nor is an example with an equal text from any file. Where not all fit, the farthest are dropped
first; a prompt that leaves no budget for any stays unchanged.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.config.rollout import RolloutDemonstrationsSection
from rayrlhf.data.dataset_rows import Rows, read_rows
from rayrlhf.data.records import Int32, Prompt
from rayrlhf.data.templates import render
from rayrlhf.demonstrations.choosing import ChoiceCounts, choose, require_pool
from rayrlhf.demonstrations.context import TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example, LeakRules
from rayrlhf.demonstrations.ranking import make_rankers
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


class PromptDemonstrations:
    """Adds demonstrations to prompts.

    Args:
        section: selection, number and `train_with`.
        budget: maximum tokens of a prompt with its demonstrations.

    Raises:
        UserError: a pool row without question or answer text; fewer examples than demonstrations.
    """

    def __init__(
        self,
        section: RolloutDemonstrationsSection,
        data: DataSection,
        tokenizer: "PreTrainedTokenizerBase",
        budget: int,
        seed: int,
    ) -> None:
        self._section, self._data, self._tokenizer = section, data, tokenizer
        self._budget, self._seed = budget, seed
        self._source = section.pool or data.train
        self._pool = read_pool(self._source, section.answer_field)

    def show(self, dataset: DatasetSection, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts with demonstrations in `token_ids`, or in `context_ids` (`train_with`).

        Args:
            dataset: of the prompts; may be the pool's.
            prompts: from `rayrlhf.data.prompt_datasets.load_prompt_dataset`.

        Raises:
            UserError: a prompt is a conversation; fewer examples than demonstrations.
        """
        section, counts = self._section, ChoiceCounts()
        rows = read_rows(dataset)
        # A pool made of the prompts themselves has one candidate fewer per prompt.
        own = _place(dataset) == _place(self._source)
        require_pool(len(self._pool) - own, section.count, self._source.path)
        targets = [self._target(rows, dataset, prompt) for prompt in prompts]
        ranker = make_rankers(section, targets, self._pool, self._seed, by_task=False)(0)
        rules = LeakRules(section.resemblance, section.resembling_words)
        chosen = choose(targets, self._pool, ranker, section.count, rules, counts)
        shown, dropped = [], 0
        for prompt, target, nearest in zip(prompts, targets, chosen, strict=True):
            token_ids, missing = self._context(prompt, target, nearest)
            dropped += missing
            without = section.train_with == "without_demonstrations"
            shown.append(replace(prompt, context_ids=token_ids) if without else replace(prompt, token_ids=token_ids))
        self._warn(dataset.path, counts, dropped)
        return shown

    def _target(self, rows: Rows, dataset: DatasetSection, prompt: Prompt) -> Example:
        if not isinstance(rows.values[prompt.id].get(rows.prompt_field), str):
            raise UserError(f"{rows.place(prompt.id)}: expected text to show demonstrations before, found a conversation")
        answer = prompt.columns.get(self._section.answer_field)
        return Example(f"{_place(dataset)}:{prompt.id}", prompt.text, answer if isinstance(answer, str) else "")

    def _context(self, prompt: Prompt, target: Example, nearest: Sequence[Example]) -> tuple[Int32, int]:
        """Return the tokens with demonstrations, and the number of dropped demonstrations."""
        write = partial(self._write, target)
        if len(write([])) > self._budget:
            return prompt.token_ids, len(nearest)  # truncated by data.overlong
        fitted = fit(nearest, self._section.order, write, len, self._budget, target.identity)
        return np.asarray(fitted.context, dtype=np.int32), fitted.dropped

    def _write(self, target: Example, shown: Sequence[Example]) -> list[int]:
        context = self._section.context
        form = TextForm(context.question, context.separator)
        if context.layout == "text":
            ids = self._tokenizer(as_text(shown, target.prompt, form))["input_ids"]
        else:
            messages = as_messages(shown, target.prompt, context.layout, form, self._data.system_prompt)
            [text] = render(self._tokenizer, [messages], [target.identity])
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _warn(self, path: str, counts: ChoiceCounts, dropped: int) -> None:
        for count, what in (
            (sum(counts.leaks.values()), "candidates skipped as leaks"),
            (counts.repeated, "candidates skipped as repeated texts"),
            (counts.short, "prompts with fewer demonstrations than requested, because the pool has no more"),
            (dropped, "farthest demonstrations dropped, over the prompt's token budget"),
        ):
            if count:
                _logger.warning("%s: rollout.demonstrations: %d %s", path, count, what)


def read_pool(section: DatasetSection, answer_field: str) -> list[Example]:
    """Return the rows of a dataset as examples, with its template applied to the prompts.

    Raises:
        UserError: a row without question or answer text, with file, row and field; or as `read_rows`.
    """
    rows = read_rows(section)
    return [_example(rows, index, section, answer_field) for index in range(len(rows.values))]


def _example(rows: Rows, index: int, section: DatasetSection, answer_field: str) -> Example:
    row = rows.values[index]
    texts = [row.get(rows.prompt_field), row.get(answer_field)]
    for name, text in zip((rows.prompt_field, answer_field), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            found = "nothing" if text is None else "an empty text" if isinstance(text, str) else type(text).__name__
            raise UserError(
                f"{rows.place(index)}: rollout.demonstrations: {name}: expected text, found {found}; "
                f"the row has {', '.join(map(str, row))}"
            )
    prompt, answer = (str(text) for text in texts)
    question = prompt if section.template is None else section.template.replace("{prompt}", prompt)
    return Example(f"{_place(section)}:{index}", question, answer)


def _place(section: DatasetSection) -> str:
    """Return the identity prefix of a dataset's rows, independent of its limit."""
    return f"{section.path}[{section.subset or ''}:{section.split}]"
