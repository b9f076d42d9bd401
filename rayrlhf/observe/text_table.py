"""Terminal tables of responses before and after training, safe for any content.

A policy's text is untrusted input to a terminal: it may contain escape sequences, direction overrides, or the table library's
markup. Text is never interpreted as markup, and invisible characters are shown escaped.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt's responses before and after training, with their scores."""

    prompt: str
    before: str
    after: str
    score_before: float
    score_after: float


def before_after_table(rows: Sequence[Comparison], *, characters: int = 400, title: str = "Before and after") -> Table:
    """Return a table to print with rich; each text is truncated to `characters`."""
    table = Table(title=title, show_lines=True, expand=True)
    for heading, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for row in rows:
        texts = (Text(printable(text, characters)) for text in (row.prompt, row.before, row.after))
        style = "green" if row.score_after > row.score_before else "red" if row.score_after < row.score_before else ""
        table.add_row(*texts, Text(f"{row.score_before:.2f} → {row.score_after:.2f}", style=style))
    return table


def printable(text: str, characters: int | None = None) -> str:
    """Return text that is safe on a terminal.

    Newlines stay, tabs become spaces, other invisible characters are escaped.

    Args:
        text: any text.
        characters: maximum length, with an ellipsis instead of the rest; None for no limit.
    """
    if characters is not None and len(text) > characters:
        text = text[: characters - 1] + "…"
    return "".join(_visible(character) for character in text.replace("\r\n", "\n").expandtabs(4))


def _visible(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    return character.encode("unicode_escape").decode("ascii")
