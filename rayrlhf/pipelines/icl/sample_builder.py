"""In-context SFT samples, and the worker of `icl build`.

A sample is a target with its demonstrations. The columns decide the loss, since SFT derives it from them: `prompt` and
`completion` train the target's answer, `messages` train every answer. A worker turns a part of examples into a part of samples,
with a memory-mapped pool. A row without a sample stays in the part with the reason in `problem`, so that counts add up.
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
from rayrlhf.data.messages import Message
from rayrlhf.data.templates import render
from rayrlhf.demonstrations.choosing import ChoiceCounts, Order, choose
from rayrlhf.demonstrations.context import Fitted, TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example, LeakRules
from rayrlhf.demonstrations.ranking import Bm25Ranker, RandomRanker, Ranker, VectorRanker
from rayrlhf.library_types import ArrowTable
from rayrlhf.pipelines.icl.example_pool import StoredPool

BM25, VECTORS, TOKENIZER = "bm25", "vectors.npy", "tokenizer"
OVER_BUDGET = "longer than sample.max_tokens without any demonstration"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Configuration of a worker, and the folder of the index.

    The folder is on this node or a shared disk.
    """

    config: ICLBuildConfig
    index: Path


class SampleBuilder:
    """Builds samples from examples."""

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
        # From the index, because paths of the configuration may be relative to the driver's working directory.
        tokenizer = AutoTokenizer.from_pretrained(
            plan.index / TOKENIZER, trust_remote_code=config.model.trust_remote_code, local_files_only=True
        )
        self._writer = SampleFormatter(config.sample, config.demonstrations.order, config.data.system_prompt, tokenizer)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the samples of a part, whose `row` is the position in the pool."""
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
    """Return the columns of the dataset: those of SFT, `source` row and `shown` demonstrations."""
    import pyarrow as pa

    text: Any = pa.string()
    messages = messages_type()
    kind = text if config.sample.layout == "text" else messages
    trained = [("messages", messages)] if config.sample.loss_on == "every" else [("prompt", kind), ("completion", kind)]
    return pa.schema([*trained, ("source", pa.int64()), ("shown", pa.int32())])


def built_schema(config: ICLBuildConfig) -> Any:
    """Return the columns of a part: those of the dataset, and counts."""
    import pyarrow as pa

    whole = pa.int32()
    counted = [(name, whole) for name in ("wanted", "short", "repeated", "dropped", "tokens")]
    facts = [("row", pa.int64()), *counted, ("leaks", pa.string()), ("problem", pa.string())]
    return pa.schema([*sample_schema(config), *(pa.field(name, kind) for name, kind in facts)])


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def draw_count(identity: str, least: int, most: int, seed: int) -> int:
    """Return a target's number of demonstrations, uniform in [least, most].

    A function of seed and identity only.
    """
    digest = hashlib.sha256(f"{seed}\0demonstrations\0{identity}".encode()).digest()
    return random.Random(digest).randint(least, most)


@dataclass(frozen=True, slots=True)
class SampleFormatter:
    """Formats samples.

    Attributes:
        section: layout, token budget and loss.
        order: display order of the demonstrations.
        system_prompt: beginning of a conversation, if any.
        tokenizer: counts tokens.
    """

    section: SampleSection
    order: Order
    system_prompt: str | None
    tokenizer: "PreTrainedTokenizerBase"

    def write(self, target: Example, nearest_first: Sequence[Example]) -> Fitted[Row] | None:
        """Return the row with the nearest demonstrations that fit.

        None where the target alone exceeds the budget.

        Raises:
            UserError: the chat template rejects it.
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
        """Count the tokens of a sample as SFT does, with the end of sequence."""
        if self.section.layout == "text":
            text, plain = f"{row['prompt']}{row['completion']}{self.tokenizer.eos_token}", True
        else:
            whole = row.get("messages") or [*row["prompt"], *row["completion"]]
            [text], plain = render(self.tokenizer, [whole], [place], whole=True), False
        return len(self.tokenizer(text, add_special_tokens=plain)["input_ids"])
