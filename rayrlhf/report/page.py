"""A report as one HTML file: it opens anywhere, offline, on paper or a phone, in light or dark.

A page is a list of blocks. Whatever text a block is given appears as text: model output is hostile input to a browser, too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from rayrlhf.data.atomic import write_atomically
from rayrlhf.report.charts import Figure

Ids = Iterator[int]


class Block(Protocol):
    """One part of a page."""

    def html(self, ids: Ids) -> str:
        """Return the block as HTML; `ids` gives numbers that are unique on the page."""
        ...


@dataclass(frozen=True, slots=True)
class Heading:
    """Starts a section."""

    text: str

    def html(self, ids: Ids) -> str:
        """Return the heading."""
        return f"<h2>{escape(self.text)}</h2>"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text; `note` makes it smaller."""

    text: str
    note: bool = False

    def html(self, ids: Ids) -> str:
        """Return the paragraph."""
        return f'<p class="note">{escape(self.text)}</p>' if self.note else f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True, slots=True)
class Tiles:
    """A row of (label, value) figures that sum the page up."""

    figures: Sequence[tuple[str, str]]

    def html(self, ids: Ids) -> str:
        """Return the tiles."""
        tiles = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in self.figures)
        return f'<div class="tiles">{"".join(tiles)}</div>'


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, and in words what it shows, for those who cannot see it and as its caption."""

    figure: Figure
    caption: str

    def html(self, ids: Ids) -> str:
        """Return the chart."""
        name, caption = f"figure-{next(ids)}", escape(self.caption)
        layout = dict(self.figure["layout"])
        title = escape(layout.pop("title"))
        plot = f'<div class="plot" role="img" aria-label="{caption}" data-figure="{name}"></div>'
        words = f'<figcaption class="note">{caption}</figcaption>{_data(name, {"data": self.figure["data"], "layout": layout})}'
        return f'<figure class="chart"><h3>{title}</h3>{plot}{words}</figure>'


@dataclass(frozen=True, slots=True)
class DataTable:
    """A table that sorts by a click on its head; `filterable` adds a search field. Numbers stand right, None is empty."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    filterable: bool = False

    def html(self, ids: Ids) -> str:
        """Return the table."""
        name = f"table-{next(ids)}"
        numeric = [any(isinstance(row[place], int | float) for row in self.rows) for place in range(len(self.columns))]
        head = "".join(
            f'<th scope="col"{" class=number" if number else ""}><button>{escape(column)}</button></th>'
            for column, number in zip(self.columns, numeric, strict=True)
        )
        body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in self.rows)
        search = f'<input type="search" data-table="{name}" placeholder="Filter rows" aria-label="Filter rows">'
        table = f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return f'{search if self.filterable else ""}<div class="scroll">{table}</div>'


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Two texts beside each other under a line of facts and a text both belong to."""

    facts: Sequence[str]
    above: tuple[str, str]
    left: tuple[str, str]
    right: tuple[str, str]

    def html(self, ids: Ids) -> str:
        """Return the pair; each text is (title, content)."""
        facts = "".join(f"<span>{escape(fact)}</span>" for fact in self.facts)
        above = f"<h4>{escape(self.above[0])}</h4><pre>{escape(self.above[1])}</pre>"
        sides = "".join(
            f"<div><h4>{escape(title)}</h4><pre>{escape(text)}</pre></div>" for title, text in (self.left, self.right)
        )
        body = f'<div class="sides" style="grid-template-columns:1fr"><div>{above}</div></div><div class="sides">{sides}</div>'
        return f'<article class="pair"><header>{facts}</header>{body}</article>'


def render(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """Return a page as one HTML text with all it needs inside."""
    ids = count(1)
    body = "\n".join(block.html(ids) for block in blocks)
    here = files("rayrlhf.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    library = f"<script>{_plotly()}</script>" if any(isinstance(block, Chart) for block in blocks) else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>\n{body}\n</main>\n'
        f"{library}<script>{script}</script></body></html>\n"
    )


def write_page(path: Path, title: str, subtitle: str, blocks: Sequence[Block]) -> None:
    """Write a page, whole or not at all."""
    write_atomically(path, render(title, subtitle, blocks))


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        return f'<td class="text">{escape(value)}</td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    return f'<td class="number" data-value="{value}">{shown}</td>'


def _data(name: str, content: Any) -> str:
    """JSON that no text in it can end: a script element ends at the first `</script`, whatever the JSON means by it."""
    text = json.dumps(content).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
