"""Report section of multi-turn samples: turns, tool calls, branches, rewards, tokens colored by KL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayrlhf.data.records import SEGMENT_STRIDE
from rayrlhf.observe.html.page import Block, Heading, Paragraph
from rayrlhf.observe.samples import PATH, TOKEN_KL, TOKENS, TRANSCRIPT
from rayrlhf.tools.report.run_blocks import Conversation, SpokenTurn, TokenLegend
from rayrlhf.tools.report.run_samples import cut, evenly_spaced

SHOWN = 8
TURN_TOKENS = 400
"""Maximum tokens of a turn that are shown in color."""
Row = Mapping[str, Any]


def conversations_section(rows: Sequence[Row]) -> Iterator[Block]:
    """Yield evenly spaced multi-turn samples of the run, with their branches."""
    samples: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get(TRANSCRIPT):
            key = (row.get("step"), row.get("prompt_id"), int(row.get("sample") or 0) % SEGMENT_STRIDE)
            samples.setdefault(key, []).append(row)
    if not samples:
        return
    yield Heading("Conversations")
    yield Paragraph(
        "A sample by turns. Text of environments and tools is not trained on. A branch of an agent's sample has the tokens "
        "before it as its context. A token's color is the policy's log-probability minus the reference's, if the run has one."
    )
    yield TokenLegend()
    keys = list(samples)
    for place in evenly_spaced(len(keys), SHOWN):
        step, prompt, number = keys[place]
        branches = sorted(samples[keys[place]], key=lambda row: int(row.get("sample") or 0))
        facts = [f"step {step}", f"prompt {prompt}, sample {number}", f"score {_scores(branches)}"]
        yield Conversation(facts, str(branches[0].get("prompt") or ""), [(_title(row), _turns(row)) for row in branches])


def _scores(branches: Sequence[Row]) -> str:
    return ", ".join(f"{score:.3f}" if isinstance(score := row.get("score"), float) else "none" for row in branches)


def _title(row: Row) -> str:
    number = int(row.get("sample") or 0) // SEGMENT_STRIDE
    path = f", path {row[PATH]}" if row.get(PATH) else ""
    return f"branch {number}{path}" if number else f"turns{path}"


def _turns(row: Row) -> list[SpokenTurn]:
    tokens, kl = row.get(TOKENS) or (), row.get(TOKEN_KL) or ()
    lines = row[TRANSCRIPT]
    colored = bool(tokens) and len(tokens) == len(kl) == sum(line.get("tokens") or 0 for line in lines)
    turns, start = [], 0
    for line in lines:
        end = start + (line.get("tokens") or 0)
        shown = slice(start, min(end, start + TURN_TOKENS)) if colored and line["speaker"] == "policy" else slice(0)
        values = [float(value or 0.0) for value in kl[shown]]
        left = end - start - TURN_TOKENS if colored and line["speaker"] == "policy" else 0
        spoken = [*tokens[shown], *([f" … [{left} more tokens]"] if left > 0 else [])]
        turns.append(
            SpokenTurn(line["speaker"], cut(line["text"]), float(line["reward"] or 0.0), spoken, [*values, 0.0][: len(spoken)])
        )
        start = end
    return turns
