"""Report sections of responses: held-out before and after, rollouts, tokens colored by KL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayrlhf.observe.html.page import Block, DataTable, Heading, Paragraph, SideBySide
from rayrlhf.observe.resampling import bootstrap_paired_difference
from rayrlhf.observe.samples import PART_PREFIX, TOKEN_KL, TOKENS
from rayrlhf.tools.report.run_blocks import ColoredTokens, TokenLegend
from rayrlhf.tools.report.run_samples import evenly_spaced, reward_parts
from rayrlhf.tools.report.run_view import RunView

PAIRS_SHOWN = 6
COLORED_SHOWN = 6
Row = Mapping[str, Any]


def answers_section(view: RunView) -> Iterator[Block]:
    """Yield held-out answers before and after: mean change with interval, and example pairs."""
    pairs = matched(view.before, view.after)
    if not pairs:
        return
    first, last = pairs[0][0].get("step"), pairs[0][1].get("step")
    yield Heading("Answers before and after")
    scored = [(one, two) for one, two in pairs if one.get("score") is not None and two.get("score") is not None]
    if scored:
        before, after = ([float(pair[side]["score"]) for pair in scored] for side in (0, 1))
        change = bootstrap_paired_difference(before, after, resamples=2000)
        yield Paragraph(
            f"{len(scored):,} held-out prompts, answered after step {first} and after step {last}: mean score "
            f"{sum(before) / len(before):.3f} → {sum(after) / len(after):.3f}, a change of {change.mean:+.3f} "
            f"(95 % interval {change.low:+.3f} to {change.high:+.3f}, bootstrap over prompts)."
        )
        scored.sort(key=lambda pair: float(pair[1]["score"]) - float(pair[0]["score"]), reverse=True)
        yield Paragraph("Shown: the largest gain, the largest loss, and pairs at even ranks between them.", note=True)
    chosen = scored or pairs
    for place in evenly_spaced(len(chosen), PAIRS_SHOWN):
        one, two = chosen[place]
        facts = [f"prompt {one.get('prompt_id')}"]
        if scored:
            facts.append(f"score {float(one['score']):.3f} → {float(two['score']):.3f}")
        left, right = (f"after step {first}", _text(one, "response")), (f"after step {last}", _text(two, "response"))
        yield SideBySide(facts, ("prompt", _text(one, "prompt")), left, right)


def tokens_section(rows: Sequence[Row]) -> Iterator[Block]:
    """Yield responses of the whole run with tokens colored by log-prob minus reference log-prob."""
    colored = [row for row in rows if row.get(TOKENS) and row.get(TOKEN_KL) and len(row[TOKENS]) == len(row[TOKEN_KL])]
    if not colored:
        return
    yield Heading("KL from the reference by token")
    yield Paragraph(
        "A token's color is the policy's log-probability minus the reference's at training time; the sum over a response is "
        "its KL in the penalty."
    )
    yield TokenLegend()
    for place in evenly_spaced(len(colored), COLORED_SHOWN):
        row = colored[place]
        kl = [float(value or 0.0) for value in row[TOKEN_KL]]
        facts = [f"step {row.get('step')}", f"score {_number(row.get('score'))}", f"KL {sum(kl):.2f} nats, {len(kl)} tokens"]
        yield ColoredTokens(facts, _text(row, "prompt"), [str(token) for token in row[TOKENS]], kl)


def rollouts_section(view: RunView) -> Iterator[Block]:
    """Yield the sampled rollouts as a filterable table, and their total number."""
    rows, total = view.rollouts.rows, view.rollouts.total
    if not rows:
        return
    yield Heading("Sampled rollouts" if view.kind != "evaluation" else "Answers")
    if len(rows) < total:
        yield Paragraph(
            f"{len(rows):,} of the {total:,} rollouts in the run folder, evenly distributed over its steps, first and last "
            "included. Texts are cut after 600 characters."
        )
    else:
        yield Paragraph(f"All {total:,} rollouts in the run folder. Texts are cut after 600 characters.")
    parts = reward_parts(rows)
    columns = {"step": "step", "score": "score", "kl": "KL", **{name: name.removeprefix(PART_PREFIX) for name in parts}}
    columns |= {"length": "tokens", "finish_reason": "end", "prompt": "prompt", "response": "response"}
    shown = {name: label for name, label in columns.items() if any(row.get(name) is not None for row in rows)}
    cells = [[_cell(row.get(name)) for name in shown] for row in rows]
    yield DataTable(list(shown.values()), cells, filterable=True, clamped=True)


def matched(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return pairs of answers to the same prompts, in the order of `before`."""
    later = {(row.get("prompt_id"), row.get("sample")): row for row in after}
    keys = [(row.get("prompt_id"), row.get("sample")) for row in before]
    return [(row, later[key]) for row, key in zip(before, keys, strict=True) if key in later]


def _cell(value: object) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _text(row: Row, name: str) -> str:
    return str(row.get(name) or "")


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "none"
