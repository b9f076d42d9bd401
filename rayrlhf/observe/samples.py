"""Sampled responses of each step with their scores, as Parquet files in `samples/`.

One file per step (`step-000012.parquet`), written atomically. Any Parquet reader opens the folder as one table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from rayrlhf.data.records import Rollout
from rayrlhf.storage.atomic import file_atomically, writing
from rayrlhf.storage.notes import reading

PART_PREFIX = "reward/"
"""Prefix of each reward component's column."""
TOKENS, TOKEN_KL = "tokens", "token_kl"
"""Optional columns: the response's tokens as text, and the KL of each."""
TRANSCRIPT = "transcript"
"""Optional column for environments: turns with speaker, text, reward and number of tokens."""
PATH = "path"
"""Optional column for environments: the agent's name for a part of a sample."""


class Line(NamedTuple):
    """One turn of a multi-turn sample: `policy` or `environment`, text, reward, number of tokens.

    The tokens before a branch of an agent's sample are its first line, `context`, and not part of the response.
    """

    speaker: str
    text: str
    reward: float
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored response.

    Attributes:
        prompt_id: row of the prompt in its dataset.
        sample: number of the response within the prompt's group.
        score: the response's score, before the KL penalty.
        parts: reward component -> value; NaN if a component does not apply.
        kl: summed over the response, in nats; None without a reference.
        length: response tokens.
        version: newest weight version of its tokens.
        tokens: each token of the response as text; None if not decoded.
        token_kl: log-prob of the policy minus that of the reference for each of `tokens`, in nats.
        transcript: the response by turns; None without an environment.
        path: the agent's name for this part of the sample.
    """

    prompt_id: int
    sample: int
    prompt: str
    response: str
    score: float
    length: int
    finish_reason: str
    version: int
    kl: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    tokens: Sequence[str] | None = None
    token_kl: Sequence[float] | None = None
    transcript: Sequence[Line] | None = None
    path: str = ""

    @classmethod
    def of(cls, rollout: Rollout, prompt: str, score: float = math.nan, *, version: int | None = None, **more: Any) -> Self:
        """Return a rollout as a sample.

        Args:
            version: the newest of its tokens when not given.
            more: further fields.
        """
        return cls(
            rollout.key.prompt,
            rollout.key.sample,
            prompt,
            rollout.text,
            score,
            len(rollout.response_ids),
            rollout.finish_reason,
            int(rollout.versions.max()) if version is None else version,
            path=rollout.path,
            **more,
        )


class SampleSink:
    """Writes the samples of a run, one file per step."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, usually `run_folder/samples`; it is created when missing.

        Raises:
            UserError: it cannot be created.
        """
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, samples: Sequence[Sample]) -> Path:
        """Write or replace one step's samples; returns the file's path.

        Raises:
            UserError: the file cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"step-{step:06d}.parquet"
        by_token = any(sample.tokens is not None and sample.token_kl is not None for sample in samples)
        played = any(sample.transcript is not None for sample in samples)
        schema = _schema(sorted({name for sample in samples for name in sample.parts}), by_token=by_token, played=played)
        table = pa.Table.from_pylist([_row(step, sample) for sample in samples], schema=schema)
        with writing(path), file_atomically(path) as partial:
            pq.write_table(table, partial)
        return path

    def rewind(self, step: int) -> None:
        """Delete the files of later steps, before a run continues after `step`."""
        for path in self.folder.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink(missing_ok=True)


def read_samples(folder: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Return all rows of a samples folder in step order, or those of a step.

    Columns may differ between steps.

    Raises:
        UserError: a file is damaged.
    """
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("step-*.parquet" if step is None else f"step-{step:06d}.parquet")):
        with reading(path, "restore it, or remove it"):
            rows += pq.read_table(path).to_pylist()
    return rows


def _schema(parts: Sequence[str], *, by_token: bool, played: bool) -> Any:
    import pyarrow as pa

    integers = [("step", pa.int64()), ("prompt_id", pa.int64()), ("sample", pa.int32())]
    texts = [("prompt", pa.string()), ("response", pa.string())]
    numbers = [("score", pa.float32()), *((PART_PREFIX + name, pa.float32()) for name in parts), ("kl", pa.float32())]
    rest = [("length", pa.int32()), ("finish_reason", pa.string()), ("version", pa.int64())]
    tokens = [(TOKENS, pa.list_(pa.string())), (TOKEN_KL, pa.list_(pa.float32()))] if by_token else []
    line = pa.struct([("speaker", pa.string()), ("text", pa.string()), ("reward", pa.float32()), ("tokens", pa.int32())])
    lines = [(TRANSCRIPT, pa.list_(line)), (PATH, pa.string())] if played else []
    return pa.schema([*integers, *texts, *numbers, *rest, *tokens, *lines])


def _row(step: int, sample: Sample) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": sample.prompt_id,
        "sample": sample.sample,
        "prompt": _storable(sample.prompt),
        "response": _storable(sample.response),
        "score": sample.score,
        **{PART_PREFIX + name: value for name, value in sample.parts.items()},
        "kl": sample.kl,
        "length": sample.length,
        "finish_reason": sample.finish_reason,
        "version": sample.version,
        TOKENS: None if sample.tokens is None else [_storable(token) for token in sample.tokens],
        TOKEN_KL: None if sample.token_kl is None else list(sample.token_kl),
        PATH: _storable(sample.path),
        TRANSCRIPT: None if sample.transcript is None else [_line(line) for line in sample.transcript],
    }


def _line(line: Line) -> dict[str, Any]:
    return line._replace(text=_storable(line.text))._asdict()


def _storable(text: str) -> str:
    """Replace lone surrogates, which a byte-level tokenizer can produce and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
