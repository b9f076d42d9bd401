"""A page is one file that needs nothing else, and text in it stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from rayrlhf.observe.html.charts import bars, histogram, lines, points, shares
from rayrlhf.observe.html.page import Chart, DataTable, Heading, Paragraph, SideBySide, Tiles, render, write_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too' \u202e \u2028"
FIGURE = histogram([1, 2], [0.0, 50.0, 100.0], title=HOSTILE, x="score", y="pairs", mark=50.0)


class Outline(HTMLParser):
    """What a browser would find: elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._raw = [], "", False

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        if not self._raw:
            self.text += data


def outline(page):
    parser = Outline()
    parser.feed(page)
    return parser


@pytest.mark.parametrize(
    "block",
    [
        Heading(HOSTILE),
        Paragraph(HOSTILE),
        Paragraph(HOSTILE, note=True),
        Tiles([(HOSTILE, HOSTILE)]),
        DataTable([HOSTILE], [[HOSTILE]], filterable=True),
        SideBySide([HOSTILE], (HOSTILE, HOSTILE), (HOSTILE, HOSTILE), (HOSTILE, HOSTILE)),
        Chart(FIGURE, HOSTILE),
    ],
    ids=lambda block: type(block).__name__,
)
def test_hostile_text_is_shown_and_adds_no_element(block):
    hostile, harmless = outline(render("t", "s", [block])), outline(render("t", "s", [Heading("x")]))
    assert HOSTILE in hostile.text
    assert not [tag for tag, _ in hostile.elements if tag == "img"]
    assert not [attrs for _, attrs in hostile.elements if "onerror" in attrs]
    own = [tag for tag, _ in hostile.elements].count("script") - [tag for tag, _ in harmless.elements].count("script")
    assert own == (2 if isinstance(block, Chart) else 0), "a chart brings its data and the library, nothing else a script"


def test_a_title_is_escaped_too():
    assert "<img" not in render(HOSTILE, HOSTILE, [])


def test_a_page_loads_nothing_from_elsewhere():
    page = render("title", "subtitle", [Chart(FIGURE, "words"), DataTable(["a"], [[1]])])
    for _tag, attributes in outline(page).elements:
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#"), "a link leads to a section of the page"
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?http", page.split("<script>", maxsplit=1)[0])


def test_the_chart_library_is_there_once_and_only_where_there_is_a_chart():
    assert len(render("t", "s", [Heading("x")])) < 20_000
    one, two = (len(render("t", "s", [Chart(FIGURE, "words")] * count)) for count in (1, 2))
    assert two - one < 5_000


def test_a_figures_data_comes_back_from_the_page():
    page = render("t", "s", [Chart(FIGURE, "words")])
    stored = json.loads(re.search(r'id="figure-1">(.*?)</script>', page, re.DOTALL)[1])
    assert stored["data"][0]["y"] == [1, 2]
    assert stored["layout"]["shapes"][0]["x0"] == 50.0


def test_a_table_keeps_numbers_for_sorting_and_leaves_none_empty():
    page = render("t", "s", [DataTable(["name", "count", "share"], [["a", 1234567, 0.123456], ["b", None, 2.0]])])
    assert '<td class="number" data-value="1234567" data-label="count">1,234,567</td>' in page
    assert '<td class="number" data-value="0.123456" data-label="share">0.12</td>' in page
    assert "<td></td>" in page


def test_a_page_is_written_whole(tmp_path):
    write_page(tmp_path / "report.html", "title", "subtitle", [Heading("größer 漢")])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_charts_are_plain_figures():
    assert shares({"kept": 3, "replaced": 1}, title="t")["data"][0]["name"] == "kept 75.0%"
    assert shares({}, title="t")["data"] == []
    assert [trace["name"] for trace in bars({"a": [1.0], "b": [2.0]}, ["x"], title="t", y="y")["data"]] == ["a", "b"]
    assert points([1.0], [2.0], title="t", x="x", y="y")["data"][0]["mode"] == "markers"
    assert lines({"a": ([0.0], [1.0])}, title="t", x="x", y="y")["data"][0]["x"] == [0.0]
    with pytest.raises(KeyError):
        render("t", "s", [Chart({"data": [], "layout": {}}, "a figure without a title")])


def test_no_script_runs_but_the_pages_own():
    page = render("t", "s", [Chart(FIGURE, HOSTILE)])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts}
    assert set(re.search(r"script-src ([^;]*)", policy)[1].split()) == hashes
    assert policy.startswith("default-src 'none';")


def test_contents_are_listed_where_a_page_has_many_sections():
    few, many = (render("t", "s", [Heading(f"part {number}") for number in range(count)]) for count in (4, 5))
    assert "<nav" not in few
    assert '<a href="#section-5">part 4</a>' in many
    assert '<section id="section-5"><h2>part 4</h2>' in many


def test_numbers_that_are_none_are_empty_cells_and_small_ones_keep_their_digits():
    page = render("t", "s", [DataTable(["a"], [[float("nan")], [0.0000123], [0.0]], clamped=True)])
    assert page.count("<td></td>") == 1
    assert '<td class="number" data-value="1.23e-05" data-label="a">1.23e-05</td>' in page
    assert 'data-whole="table-1"' in page
