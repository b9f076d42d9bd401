"""Page blocks of run reports: chart grids, notices, folded texts, colored tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from rayrlhf.observe.html.page import Block, Chart, Ids, preformatted

KL_STEPS = (0.05, 0.25, 1.0)
"""Thresholds in nats per token of faint, clear and strong color."""


@dataclass(frozen=True, slots=True)
class ChartGrid:
    """Charts in a grid that adapts to the window's width."""

    blocks: Sequence[Chart]

    def html(self, ids: Ids) -> str:
        """Return the charts."""
        return f'<div class="grid">{"".join(chart.html(ids) for chart in self.blocks)}</div>'


@dataclass(frozen=True, slots=True)
class Notice:
    """A highlighted message: severity, title, lines."""

    kind: Literal["good", "info", "warning", "bad"]
    title: str
    lines: Sequence[str] = ()

    def html(self, ids: Ids) -> str:
        """Return the notice."""
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        listed = f"<ul>{lines}</ul>" if lines else ""
        return f'<div class="notice {self.kind}"><strong>{escape(self.title)}</strong>{listed}</div>'


@dataclass(frozen=True, slots=True)
class Folded:
    """A collapsible long text or list of blocks."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()

    def html(self, ids: Ids) -> str:
        """Return the text and the blocks."""
        content = (preformatted(self.text) if self.text else "") + "".join(block.html(ids) for block in self.blocks)
        return f"<details><summary>{escape(self.title)}</summary>{content}</details>"


@dataclass(frozen=True, slots=True)
class CurveControls:
    """Controls of all curves: smoothing, and visibility of the other run."""

    other: str | None

    def html(self, ids: Ids) -> str:
        """Return the controls."""
        slider = '<label>smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02" value="0.6"></label>'
        box = "" if self.other is None else f'<label><input type="checkbox" id="compare" checked> {escape(self.other)}</label>'
        return f'<div class="tools">{slider}{box}</div>'


@dataclass(frozen=True, slots=True)
class ColoredTokens:
    """A response with tokens colored by their KL from the reference.

    Attributes:
        facts: about the response, one line.
        prompt: text of the prompt.
        tokens: the response's tokens as text.
        kl: log-prob of the policy minus that of the reference for each of `tokens`, in nats.
    """

    facts: Sequence[str]
    prompt: str
    tokens: Sequence[str]
    kl: Sequence[float]

    def html(self, ids: Ids) -> str:
        """Return the response."""
        facts = "".join(f"<span>{escape(fact)}</span>" for fact in self.facts)
        spans = _colored(self.tokens, self.kl)
        prompt = f"<h3>prompt</h3>{preformatted(self.prompt)}<h3>response</h3>"
        return f'<article class="pair"><header>{facts}</header>{prompt}<pre class="tokens" tabindex="0">{spans}</pre></article>'


class SpokenTurn(NamedTuple):
    """One turn: speaker, text or tokens with their KL, and reward."""

    speaker: str
    text: str
    reward: float
    tokens: Sequence[str] = ()
    kl: Sequence[float] = ()

    def html(self) -> str:
        """Return the turn as an item of a list."""
        text = _colored(self.tokens, self.kl) if self.tokens else escape(self.text)
        reward = f'<span class="reward">reward {self.reward:+.3g}</span>' if self.reward else ""
        head = f"<header><span>{escape(self.speaker)}</span>{reward}</header>"
        return f'<li class="{escape(self.speaker)}">{head}<pre class="tokens" tabindex="0">{text}</pre></li>'


@dataclass(frozen=True, slots=True)
class Conversation:
    """A multi-turn sample: its branches, each with its turns.

    Attributes:
        facts: about the sample, one line.
        prompt: text of the prompt.
        branches: title and turns of each; the first is the trunk.
    """

    facts: Sequence[str]
    prompt: str
    branches: Sequence[tuple[str, Sequence[SpokenTurn]]]

    def html(self, ids: Ids) -> str:
        """Return the conversation."""
        facts = "".join(f"<span>{escape(fact)}</span>" for fact in self.facts)
        parts = "".join(
            f'<h3>{escape(title)}</h3><ol class="turns">{"".join(turn.html() for turn in turns)}</ol>'
            for title, turns in self.branches
        )
        return f'<article class="pair"><header>{facts}</header><h3>prompt</h3>{preformatted(self.prompt)}{parts}</article>'


@dataclass(frozen=True, slots=True)
class TokenLegend:
    """Legend of token colors."""

    def html(self, ids: Ids) -> str:
        """Return the legend."""
        faint, clear, strong = KL_STEPS
        parts = [("up", "more likely than under the reference"), ("down", "less likely")]
        keys = "".join(
            f'<span><span class="{kind}-1">{faint:g}</span><span class="{kind}-2">{clear:g}</span>'
            f'<span class="{kind}-3">{strong:g}</span> {words}</span>'
            for kind, words in parts
        )
        return f'<p class="note legend">{keys}<span>nats per token or more</span></p>'


def _colored(tokens: Sequence[str], kl: Sequence[float]) -> str:
    return "".join(
        f'<span class="{kl_class(value)}" title="{value:+.3f} nats">{escape(token)}</span>'
        for token, value in zip(tokens, kl, strict=True)
    )


def kl_class(value: float) -> str:
    """Return the style class of a token: `up-N`, `down-N`, or `level` near 0."""
    strength = sum(abs(value) >= step for step in KL_STEPS)
    return f"{'up' if value > 0 else 'down'}-{strength}" if strength else "level"
