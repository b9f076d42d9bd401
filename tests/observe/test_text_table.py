"""The before/after table, given what a hostile policy might write."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rayrlhf.observe.text_table import Comparison, before_after_table, printable


def rendered(*rows: Comparison, **options: int) -> str:
    console = Console(record=True, width=160, file=io.StringIO(), force_terminal=True)
    console.print(before_after_table(rows, **options))
    return console.export_text()


def test_the_table_shows_prompt_responses_and_scores():
    text = rendered(Comparison("2+2?", "five", "four", 0.1, 0.95))
    for part in ("2+2?", "five", "four", "0.10 → 0.95", "before", "after"):
        assert part in text


@pytest.mark.parametrize("markup", ["[bold]x[/bold]", "[/]", "[link=file:///etc/passwd]x[/link]", "[red", ":smile:", "\\[b]"])
def test_markup_in_a_response_is_shown_and_not_obeyed(markup: str):
    assert markup in rendered(Comparison("p", markup, "x", 0, 0))


def test_escape_sequences_and_invisible_characters_are_shown_as_escapes():
    assert printable("\x1b[31mred\x07\x00") == "\\x1b[31mred\\x07\\x00"
    assert printable("a\u202eb\u200bc\ufeff\ud800") == "a\\u202eb\\u200bc\\ufeff\\ud800"
    assert printable("a\r\nb\rc") == "a\nb\\rc"
    assert printable("c\td") == "c   d"


def test_ordinary_text_stays_as_it_is():
    assert printable("größe, 数字\n\u202f3 ½ 🙂") == "größe, 数字\n\u202f3 ½ 🙂"


@given(st.text(max_size=80))
def test_nothing_printed_can_move_the_cursor(text: str):
    shown = printable(text)
    assert all(c == "\n" or unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)


@given(st.text(max_size=40))
def test_any_response_renders(text: str):
    assert "0.00 → 1.00" in rendered(Comparison(text, text, text, 0, 1))


def test_long_texts_are_cut():
    assert printable("a" * 100, 10) == "a" * 9 + "…"
    text = rendered(Comparison("p", "b" * 1000, "c", 0, 0), characters=50)
    assert text.count("b") < 60
