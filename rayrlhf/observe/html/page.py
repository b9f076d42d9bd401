"""Report pages: one HTML file for offline use, print and phones, light and dark.

A page is a list of blocks; a heading starts a section. All text is escaped, since model output is untrusted input to a browser.
As a second defense, the content security policy allows only the page's own scripts, by hash, and no network access.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Protocol

from rayrlhf.observe.html.charts import Figure
from rayrlhf.storage.atomic import write_atomically

Ids = Iterator[int]
MAX_SECTIONS_WITHOUT_CONTENTS = 4
ROWS_WITHOUT_SCROLLING = 30


class Block(Protocol):
    """One part of a page."""

    def html(self, ids: Ids) -> str:
        """Return the block as HTML; `ids` yields numbers that are unique on the page."""
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
    """A row of (label, value) figures that summarize the page."""

    figures: Sequence[tuple[str, str]]

    def html(self, ids: Ids) -> str:
        """Return the tiles."""
        tiles = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in self.figures)
        return f'<div class="tiles">{"".join(tiles)}</div>'


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with a caption, which is also its accessible description.

    `tall` is the height in pixels; None for the default.
    """

    figure: Figure
    caption: str
    tall: int | None = None

    def html(self, ids: Ids) -> str:
        """Return the chart."""
        name, caption = f"figure-{next(ids)}", escape(self.caption)
        layout = dict(self.figure["layout"])
        title = escape(layout.pop("title"))
        size = "" if self.tall is None else f' style="height:{self.tall}px"'
        plot = f'<div class="plot" role="img" aria-label="{title}: {caption}" data-figure="{name}"{size}></div>'
        words = f'<figcaption class="note">{caption}</figcaption>{_data(name, {"data": self.figure["data"], "layout": layout})}'
        return f'<figure class="chart"><h3>{title}</h3>{plot}{words}</figure>'


@dataclass(frozen=True, slots=True)
class DataTable:
    """A table sorted by a click on a column head; None is an empty cell.

    `filterable` adds a search field; `clamped` shows four lines of each text, and a checkbox for whole texts.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    filterable: bool = False
    clamped: bool = False

    def html(self, ids: Ids) -> str:
        """Return the table."""
        name = f"table-{next(ids)}"
        numeric = [any(isinstance(row[place], int | float) for row in self.rows) for place in range(len(self.columns))]
        head = "".join(
            f'<th scope="col"{" class=number" if number else ""}><button>{escape(column)}</button></th>'
            for column, number in zip(self.columns, numeric, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row, self.columns))}</tr>" for row in self.rows)
        kind = ' class="clamped"' if self.clamped else ""
        shown = ", ".join(self.columns[:3])
        table = f'<table id="{name}"{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        size = "scroll long" if len(self.rows) > ROWS_WITHOUT_SCROLLING else "scroll"
        scroll = f'<div class="{size}" tabindex="0" role="region" aria-label="Table: {escape(shown)}">{table}</div>'
        return self._tools(name) + scroll

    def _tools(self, name: str) -> str:
        found = f'<output data-count="{name}" aria-live="polite">{len(self.rows):,} rows</output>'
        search = f'<input type="search" data-table="{name}" placeholder="Filter rows" aria-label="Filter rows">{found}'
        whole = f'<label><input type="checkbox" data-whole="{name}"> whole texts</label>'
        tools = (search if self.filterable else "") + (whole if self.clamped else "")
        return f'<div class="tools">{tools}</div>' if tools else ""


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Two texts side by side, below a line of facts and a common text."""

    facts: Sequence[str]
    above: tuple[str, str]
    left: tuple[str, str]
    right: tuple[str, str]

    def html(self, ids: Ids) -> str:
        """Return the pair; each text is (title, content)."""
        facts = "".join(f"<span>{escape(fact)}</span>" for fact in self.facts)
        above = f"<h3>{escape(self.above[0])}</h3>{preformatted(self.above[1])}"
        sides = "".join(f"<div><h3>{escape(title)}</h3>{preformatted(text)}</div>" for title, text in (self.left, self.right))
        body = f'<div class="sides" style="grid-template-columns:1fr"><div>{above}</div></div><div class="sides">{sides}</div>'
        return f'<article class="pair"><header>{facts}</header>{body}</article>'


def render(title: str, subtitle: str, blocks: Sequence[Block], *, live: bool = False) -> str:
    """Return a page as self-contained HTML.

    Args:
        live: for a served page: it loads the chart library and newer versions of itself from its own server only.
    """
    ids = count(1)
    body = "\n".join(_sections(blocks, ids)).replace("\0", "\ufffd")  # no HTML may hold NUL, in any form
    here = files("rayrlhf.observe.html")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    scripts = [chart_library()] if not live and has_chart(blocks) else []
    scripts += [script, here.joinpath("live.js").read_text(encoding="utf-8")] if live else [script]
    elements = "".join(f"<script>{text}</script>" for text in scripts)
    library = '<script src="plotly.js"></script>' if live else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts, live)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>\n{body}\n</main>\n'
        f"{library}{elements}</body></html>\n"
    )


def has_chart(blocks: Sequence[Block]) -> bool:
    """Return True if any block or nested block is a chart."""
    return any(isinstance(block, Chart) or has_chart(getattr(block, "blocks", ())) for block in blocks)


def write_page(path: Path, title: str, subtitle: str, blocks: Sequence[Block]) -> None:
    """Write a page atomically."""
    write_atomically(path, render(title, subtitle, blocks))


def preformatted(text: str) -> str:
    """Return preformatted text in a box that scrolls if it is long."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _sections(blocks: Sequence[Block], ids: Ids) -> Iterator[str]:
    """Yield the HTML of each section, and the contents with links to them."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for block in blocks:
        if isinstance(block, Heading):
            groups.append((block.text, []))
        groups[-1][1].append(block.html(ids))
    titles = [title for title, _ in groups[1:]]
    for number, (_, parts) in enumerate(groups):
        yield f'<section id="section-{number}">{"".join(parts)}</section>' if number or parts else ""
        if not number and len(titles) > MAX_SECTIONS_WITHOUT_CONTENTS:
            links = (f'<a href="#section-{place}">{escape(title)}</a>' for place, title in enumerate(titles, start=1))
            yield f'<nav aria-label="Contents">{"".join(links)}</nav>'


def _policy(scripts: Sequence[str], live: bool) -> str:
    """Return the content security policy: own scripts only, no network.

    A live page may connect to its own server.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join([*(f"'sha256-{found}'" for found in hashes), *(["'self'"] if live else [])])
    network = "; connect-src 'self'" if live else ""
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}{network}"


def _cell(value: str | int | float | None, column: str) -> str:
    """Return a cell; narrow windows show its column's name in front of it."""
    label = f' data-label="{escape(column)}"'
    if isinstance(value, str):
        return f'<td class="text"{label}><div>{escape(value)}</div></td>'
    if value is None or not math.isfinite(value):
        return "<td></td>"
    shown = f"{value:,}" if isinstance(value, int) else _decimal(value)
    return f'<td class="number" data-value="{value}"{label}>{shown}</td>'


def _decimal(value: float) -> str:
    """Format with two decimals, or three digits for small values."""
    return f"{value:,.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def _data(name: str, content: object) -> str:
    """Return a JSON script element; `<` is escaped, since `</script` would end the element."""
    text = json.dumps(content).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def chart_library() -> str:
    """Return the script that draws charts."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
