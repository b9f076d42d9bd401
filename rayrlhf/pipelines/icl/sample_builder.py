"""A target and its demonstrations as one row for SFT: how many, which of them fit, and in which columns; pure.

Columns say what is learnt, since SFT reads it off them: a `prompt` with its `completion` teaches the target's answer alone,
`messages` teach every answer.

What one process of `icl build` does: a part of examples becomes a part of samples, beside a pool it maps into memory.

Every row is answered for: one that makes no sample keeps its place with the reason in `problem`, so that counts add up.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.source import messages_type
from rayrlhf.config.icl import ICLBuildConfig, SampleSection
from rayrlhf.config.library_types import ArrowTable
from rayrlhf.data.templates import Message, render
from rayrlhf.demonstrations.choosing import ChoiceCounts, Order, choose
from rayrlhf.demonstrations.context import Fitted, TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example, LeakRules
from rayrlhf.demonstrations.ranking import Bm25Ranker, RandomRanker, Ranker, VectorRanker
from rayrlhf.pipelines.icl.example_pool import StoredPool

BM25, VECTORS, TOKENIZER = "bm25", "vectors.npy", "tokenizer"
OVER_BUDGET = "longer than sample.max_tokens without any demonstration"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a process needs to know: the configuration, and where the index lies on this machine or a shared disk."""

    config: ICLBuildConfig
    index: Path


class SampleBuilder:
    """Makes samples of examples."""

    def __init__(self, plan: BuildPlan) -> None:
        """Open the index and load the tokenizer."""
        from transformers import AutoTokenizer

        self._config = config = plan.config
        self._pool = StoredPool(plan.index)
        self._tasks = self._pool.tasks if config.data.task_field is not None else None
        self._vectors: NDArray[np.float32] | None = None
        if config.demonstrations.selection == "nearest":
            self._vectors = np.load(plan.index / VECTORS, mmap_mode="r")
        self._bm25 = Bm25Ranker.open(plan.index / BM25, self._tasks) if config.demonstrations.selection == "bm25" else None
        self._rules = LeakRules(config.demonstrations.resemblance, config.demonstrations.resembling_words)
        # From the index and not from the configuration: paths in that may be relative to where the driver runs.
        tokenizer = AutoTokenizer.from_pretrained(
            plan.index / TOKENIZER, trust_remote_code=config.model.trust_remote_code, local_files_only=True
        )
        self._writer = SampleFormatter(config.sample, config.demonstrations.order, config.data.system_prompt, tokenizer)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the samples of a part; `row` of its rows is their position in the pool."""
        import pyarrow as pa

        rows = table.select(["row", "source"]).to_pylist()
        targets = [self._pool[row["row"]] for row in rows]
        ranker = self._ranker({target.identity: row["row"] for target, row in zip(targets, rows, strict=True)})
        made = [row | self._sample(target, ranker) for target, row in zip(targets, rows, strict=True)]
        return pa.Table.from_pylist(made, schema=built_schema(self._config))

    def _ranker(self, positions: Mapping[str, int]) -> Ranker:
        if self._bm25 is not None:
            return self._bm25
        if self._vectors is not None:
            vectors = self._vectors
            queries = {identity: vectors[position] for identity, position in positions.items()}
            return VectorRanker(vectors, queries, self._tasks)
        return RandomRanker(len(self._pool), self._config.run.seed, self._tasks)

    def _sample(self, target: Example, ranker: Ranker) -> dict[str, Any]:
        section = self._config.demonstrations
        wanted = draw_count(target.identity, section.least, section.most, self._config.run.seed)
        counts = ChoiceCounts()
        [chosen] = choose([target], self._pool, ranker, wanted, self._rules, counts) if wanted else [[]]
        facts = {
            "wanted": wanted,
            "short": wanted - len(chosen),
            "leaks": json.dumps(counts.leaks),
            "repeated": counts.repeated,
        }
        fitted = self._writer.write(target, chosen)
        if fitted is None:
            return facts | {"shown": 0, "dropped": 0, "tokens": 0, "problem": OVER_BUDGET}
        facts |= {"shown": len(fitted.demonstrations), "dropped": fitted.dropped, "tokens": fitted.tokens, "problem": ""}
        return facts | fitted.context


def sample_schema(config: ICLBuildConfig) -> Any:
    """Return the columns of the dataset: those SFT reads, the row of the source, and the demonstrations shown."""
    import pyarrow as pa

    text: Any = pa.string()
    messages = messages_type()
    kind = text if config.sample.layout == "text" else messages
    learnt = [("messages", messages)] if config.sample.loss_on == "every" else [("prompt", kind), ("completion", kind)]
    return pa.schema([*learnt, ("source", pa.int64()), ("shown", pa.int32())])


def built_schema(config: ICLBuildConfig) -> Any:
    """Return the columns of a part: those of the dataset, and what became of the row."""
    import pyarrow as pa

    whole = pa.int32()
    counted = [(name, whole) for name in ("wanted", "short", "repeated", "dropped", "tokens")]
    told = [("row", pa.int64()), *counted, ("leaks", pa.string()), ("problem", pa.string())]
    return pa.schema([*sample_schema(config), *(pa.field(name, kind) for name, kind in told)])


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def draw_count(identity: str, least: int, most: int, seed: int) -> int:
    """Return how many demonstrations a target gets: evenly from `least` to `most`, a function of seed and identity alone."""
    digest = hashlib.sha256(f"{seed}\0demonstrations\0{identity}".encode()).digest()
    return random.Random(digest).randint(least, most)


@dataclass(frozen=True, slots=True)
class SampleFormatter:
    """Writes samples.

    Attributes:
        section: layout, budget, and what is learnt.
        order: of the demonstrations on show.
        system_prompt: first words of a conversation, if any.
        tokenizer: counts tokens.
    """

    section: SampleSection
    order: Order
    system_prompt: str | None
    tokenizer: "PreTrainedTokenizerBase"

    def write(self, target: Example, nearest_first: Sequence[Example]) -> Fitted[Row] | None:
        """Return the row with as many of the nearest demonstrations as fit; None where the target alone is over the budget.

        Raises:
            UserError: the chat template refuses it.
        """
        if self._tokens(self._row(target, []), target.identity) > self.section.max_tokens:
            return None
        return fit(
            nearest_first,
            self.order,
            lambda shown: self._row(target, shown),
            lambda row: self._tokens(row, target.identity),
            self.section.max_tokens,
            target.identity,
        )

    def _row(self, target: Example, shown: Sequence[Example]) -> Row:
        form = TextForm(self.section.question, self.section.separator)
        if self.section.layout == "text":
            return {"prompt": as_text(shown, target.prompt, form), "completion": target.answer}
        messages = as_messages(shown, target.prompt, self.section.layout, form, self.system_prompt)
        answer: list[Message] = [{"role": "assistant", "content": target.answer}]
        if self.section.loss_on == "every":
            return {"messages": [*messages, *answer]}
        return {"prompt": messages, "completion": answer}

    def _tokens(self, row: Row, place: str) -> int:
        """Count as SFT will: the whole sample, its end included."""
        if self.section.layout == "text":
            text, plain = f"{row['prompt']}{row['completion']}{self.tokenizer.eos_token}", True
        else:
            whole = row.get("messages") or [*row["prompt"], *row["completion"]]
            [text], plain = render(self.tokenizer, [whole], [place], whole=True), False
        return len(self.tokenizer(text, add_special_tokens=plain)["input_ids"])
