"""Questions of a k-curve: a row per target, number of demonstrations, seed and ablation.

The demonstrations of a target are selected once, for the largest k, and each smaller k uses the nearest of them. Those that do
not fit into the model's context are dropped, the farthest first, and counted. The count reveals a curve that is flat for lack
of context.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from rayrlhf.config.icl import ShotsSection
from rayrlhf.config.rollout import ContextSection
from rayrlhf.data.messages import Message
from rayrlhf.data.templates import render
from rayrlhf.demonstrations.choosing import ChoiceCounts, choose
from rayrlhf.demonstrations.context import TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example, LeakRules
from rayrlhf.demonstrations.ranking import Ranker
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer

Ablation = Literal["none", "flip", "format"]


class AnswerCorruptor:
    """Replaces the answers of demonstrations, never those of questions.

    `format` gives each demonstration an answer drawn at random from all answers. The form and the label space stay, the mapping
    is gone (Min et al. 2022, "Rethinking the Role of Demonstrations"). `flip` exchanges answers by one fixed rule for the whole
    run. The mapping is there and contradicts the truth (Wei et al. 2023, "Larger language models do in-context learning
    differently"). A model that uses the mapping drops to chance under `format` and below chance under `flip`.
    """

    def __init__(self, ablation: Ablation, answers: Sequence[str], seed: int) -> None:
        """Fix the replacement of every answer.

        Args:
            ablation: `none` replaces nothing.
            answers: the answers of the pool, in any order.
            seed: of the permutation and the draws.

        Raises:
            UserError: an ablation of a pool with only one answer.
        """
        self._ablation, self._seed = ablation, seed
        self._answers = sorted(set(answers))
        if ablation != "none" and len(self._answers) < 2:
            raise UserError(f"ablation {ablation}: the pool has {len(self._answers)} different answers, expected at least 2")
        shuffled = random.Random(seed).sample(self._answers, len(self._answers))
        self._other = dict(zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True))

    def corrupt(self, target: Example, demonstrations: Sequence[Example]) -> list[Example]:
        """Return the demonstrations of a target's context.

        A function of seed, target and demonstration only.
        """
        if self._ablation == "none":
            return list(demonstrations)
        if self._ablation == "flip":
            return [replace(shown, answer=self._other[shown.answer]) for shown in demonstrations]
        return [replace(shown, answer=self._drawn(target, shown)) for shown in demonstrations]

    def _drawn(self, target: Example, shown: Example) -> str:
        key = f"{self._seed}\0{target.identity}\0{shown.identity}".encode()
        return random.Random(hashlib.sha256(key).digest()).choice(self._answers)


def copy_control(demonstrations: Sequence[Example], answer: str) -> float:
    """Return the expected accuracy, in [0, 1], of copying a random demonstration's answer unread.

    0 without demonstrations.
    """
    if not demonstrations:
        return 0.0
    return sum(shown.answer == answer for shown in demonstrations) / len(demonstrations)


Row = dict[str, Any]
Context = str | list[Message]


@dataclass(frozen=True, slots=True)
class QuestionBuilder:
    """Builds the questions for one model.

    Attributes:
        section: numbers of demonstrations, and ablations.
        system_prompt: beginning of a conversation or text, if any.
        budget: maximum tokens of a context, without the answer.
    """

    section: ShotsSection
    context: ContextSection
    system_prompt: str | None
    tokenizer: Tokenizer
    budget: int

    def rows(
        self,
        targets: Sequence[Example],
        pool: Sequence[Example],
        ranker: Callable[[int], Ranker],
        counts: ChoiceCounts,
    ) -> Iterator[Row]:
        """Yield a row per (seed, target, ablation, k), without its number `row`.

        Args:
            pool: the examples that the rankers' positions index.
            ranker: returns the ranker of a seed.
            counts: updated in place.

        Raises:
            UserError: a question alone exceeds the budget, or an ablation of a pool with only one answer.
        """
        rules = LeakRules(self.section.resemblance, self.section.resembling_words)
        for seed in range(self.section.draws):
            corruptors = {
                name: AnswerCorruptor(name, [shown.answer for shown in pool], seed) for name in self.section.ablations
            }
            largest = max(self.section.counts)
            chosen = choose(targets, pool, ranker(seed), largest, rules, counts) if largest else [[] for _ in targets]
            for number, (target, nearest) in enumerate(zip(targets, chosen, strict=True)):
                for ablation, corruptor in corruptors.items():
                    for k in self._counts(ablation):
                        yield self._row(number, seed, ablation, k, target, corruptor.corrupt(target, nearest[:k]))

    def _counts(self, ablation: Ablation) -> list[int]:
        """Return the numbers of demonstrations; 0 only without an ablation."""
        return [count for count in self.section.counts if count or ablation == "none"]

    def _row(self, number: int, seed: int, ablation: Ablation, k: int, target: Example, nearest: Sequence[Example]) -> Row:
        write = partial(self._write, target.prompt)
        fitted = fit(nearest, self.section.order, write, partial(self._tokens, target.identity), self.budget, target.identity)
        text = isinstance(fitted.context, str)
        return {
            "source": number,
            "identity": target.identity,
            "seed": seed,
            "ablation": ablation,
            "k": k,
            "shown": len(fitted.demonstrations),
            "dropped": fitted.dropped,
            "copying": copy_control(fitted.demonstrations, target.answer),
            "question": target.prompt,
            "answer": target.answer,
            "prompt": fitted.context if text else target.prompt,
            "messages": None if text else json.dumps(fitted.context, ensure_ascii=False),
        }

    def _write(self, prompt: str, shown: Sequence[Example]) -> Context:
        form = TextForm(self.context.question, self.context.separator)
        if self.context.layout == "text":
            return as_text(shown, prompt, form, self.system_prompt)
        return as_messages(shown, prompt, self.context.layout, form, self.system_prompt)

    def _tokens(self, place: str, context: Context) -> int:
        """Count tokens as generation does."""
        if isinstance(context, str):
            return len(self.tokenizer(context)["input_ids"])
        [text] = render(self.tokenizer, [context], [place])
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def question_schema() -> Any:
    """Return the columns of the questions' part files."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    return pa.schema(
        [
            ("row", whole),
            ("source", whole),
            ("identity", text),
            ("seed", pa.int32()),
            ("ablation", text),
            ("k", pa.int32()),
            ("shown", pa.int32()),
            ("dropped", pa.int32()),
            ("copying", pa.float64()),
            ("question", text),
            ("answer", text),
            ("prompt", text),
            ("messages", text),
            ("columns", text),
        ]
    )
