"""Prompts of PPO with demonstrations before them: what the sampler reads, chosen once a run by the rules of this room.

Everybody else reads the same, or the bare prompt (`train_with`). A prompt is never its own demonstration, nor is an example
with its text, from whatever file. Where not all demonstrations fit, the farthest go first; a prompt with room for none stays as
it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.config.demonstrations import RolloutDemonstrationsSection
from rayrlhf.data.dataset_rows import Rows, read_rows
from rayrlhf.data.records import Int32, Prompt
from rayrlhf.data.templates import render
from rayrlhf.demonstrations.choosing import ChoiceCounts, choose, require_pool
from rayrlhf.demonstrations.context import TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.leaks import LeakRules
from rayrlhf.demonstrations.rankers import make_rankers
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


class Demonstrator:
    """Puts demonstrations before prompts.

    Args:
        section: which, how many, and who reads them.
        data: how prompts are made.
        tokenizer: of the policy.
        budget: most tokens of a prompt with its demonstrations.
        seed: of the run.

    Raises:
        UserError: a row of the pool without a text to ask or to answer; fewer examples than demonstrations.
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
        """Return the prompts with demonstrations: as their tokens, or as `context_ids` when training without them.

        Args:
            dataset: that the prompts are of, the pool's own or another.
            prompts: as `rayrlhf.data.prompt_datasets.load_prompt_dataset` makes them.

        Raises:
            UserError: a prompt is a conversation; fewer examples than demonstrations.
        """
        section, counts = self._section, ChoiceCounts()
        rows = read_rows(dataset)
        # A pool that the prompts are of themselves has to leave each of them out.
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
            bare = section.train_with == "without_demonstrations"
            shown.append(replace(prompt, context_ids=token_ids) if bare else replace(prompt, token_ids=token_ids))
        self._tell(dataset.path, counts, dropped)
        return shown

    def _target(self, rows: Rows, dataset: DatasetSection, prompt: Prompt) -> Example:
        if not isinstance(rows.values[prompt.id].get(rows.prompt_field), str):
            raise UserError(f"{rows.place(prompt.id)}: expected text to show demonstrations before, found a conversation")
        answer = prompt.columns.get(self._section.answer_field)
        return Example(f"{_place(dataset)}:{prompt.id}", prompt.text, answer if isinstance(answer, str) else "")

    def _context(self, prompt: Prompt, target: Example, nearest: Sequence[Example]) -> tuple[Int32, int]:
        """What is read in place of a prompt, and how many demonstrations did not fit."""
        write = partial(self._write, target)
        if len(write([])) > self._budget:
            return prompt.token_ids, len(nearest)  # cut by data.overlong
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

    def _tell(self, path: str, counts: ChoiceCounts, dropped: int) -> None:
        for count, what in (
            (sum(counts.leaks.values()), "candidates passed over as leaks"),
            (counts.repeated, "candidates passed over as repeated texts"),
            (counts.short, "prompts with fewer demonstrations than asked for, since there are no more"),
            (dropped, "demonstrations dropped from the far end, over the prompt's tokens"),
        ):
            if count:
                _logger.warning("%s: rollout.demonstrations: %d %s", path, count, what)


def read_pool(section: DatasetSection, answer_field: str) -> list[Example]:
    """Return the rows of a dataset as examples, its template around their prompts.

    Raises:
        UserError: naming file, row and field: no text to ask or to answer; or as `read_rows`.
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
    asked = prompt if section.template is None else section.template.replace("{prompt}", prompt)
    return Example(f"{_place(section)}:{index}", asked, answer)


def _place(section: DatasetSection) -> str:
    """Name the rows of a dataset, equal for equal rows whatever their limit."""
    return f"{section.path}[{section.subset or ''}:{section.split}]"
