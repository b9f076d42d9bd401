"""The report and the live page as a reader meets them: in headless Chromium, wide and narrow, light and dark, by keyboard."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.tools.report.run_page import write_run_report
from rayrlhf.tools.watch.watch_server import RunServer
from tests.tools.report.runs import write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed (extra: test)"
)

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        # A test runs as root in containers, where Chromium's own sandbox cannot.
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages to open: a run against another one, and one whose every text is hostile."""
    folder = tmp_path_factory.mktemp("reports")
    first, second = write_run(folder / "one"), write_run(folder / "two", name="second", steps=12, seed=1)
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "half')
    hostile = write_run(folder / "three", steps=3, hostile=True)
    return {
        "both": write_run_report(first, compare=second, output=folder / "both.html"),
        "hostile": write_run_report(hostile, output=folder / "hostile.html"),
    }


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a page and, at the end, holds it to a clean console and to no request but for itself."""
    contexts, complaints, requests = [], list[str](), list[str]()

    def opened(address: str, *, width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    opened.complaints = complaints  # type: ignore[attr-defined]
    yield opened
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file://", "data:", "blob:", "http://127.0.0.1:"))] == []
    for context in contexts:
        context.close()


def scroll_through(page: Page) -> None:
    """Come past every chart, because charts are drawn when they come into sight."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()


def traces(page: Page, title: str) -> list[dict[str, Any]]:
    """The traces that a chart draws now."""
    chart = page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True))
    chart.scroll_into_view_if_needed()
    chart.locator(".main-svg").first.wait_for()
    found: list[dict[str, Any]] = chart.locator(".plot").evaluate(
        "(plot) => plot.data.map((trace) => ({ name: trace.name, y: Array.from(trace.y), opacity: trace.opacity ?? 1 }))"
    )
    return found


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_is_whole_readable_and_accessible_light_and_dark(open_page: Open, reports: dict[str, Path], width: int):
    page = open_page(reports["both"].as_uri(), width=width)
    scroll_through(page)
    empty = "Array.from(document.querySelectorAll('.plot')).filter((plot) => !plot.querySelector('.trace, .bars path')).length"
    # Dark differs in colors alone, so one rule is asked of it.
    for scheme, rules in (("light", None), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]")
        assert (lightness > 128) == (scheme == "light")
        assert page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill") == page.evaluate(
            "getComputedStyle(document.body).color"
        ), "charts follow the reader's mode"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
        cut = "Array.from(document.querySelectorAll('.scroll')).filter((one) => one.scrollWidth > one.clientWidth + 1).length"
        assert width > 400 or page.evaluate(cut) == 0, "no column is cut"
        assert page.evaluate(empty) == 0, "every chart shows its data"
        # What is inside a chart is one image to a reader's aids; its colors are checked above.
        found = axe.Axe().run(page, context={"exclude": [[".svg-container"]]}, options=rules).response["violations"]
        assert [
            (each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")
        ] == []


def test_hostile_text_is_shown_and_does_nothing(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["hostile"].as_uri())
    scroll_through(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img").count() == 0
    assert "<script>window.hacked=1</script>" in page.locator("main").inner_text()


def test_a_script_that_slipped_in_would_not_run(open_page: Open, reports: dict[str, Path], tmp_path: Path):
    text = reports["hostile"].read_text(encoding="utf-8")
    slipped = tmp_path / "slipped.html"
    slipped.write_text(text.replace("</main>", "<script>window.hacked=3</script><img src=x onerror='window.hacked=4'></main>"))
    page = open_page(slipped.as_uri())
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    complaints = open_page.complaints  # type: ignore[attr-defined]
    assert any("Content Security Policy" in complaint for complaint in complaints)
    complaints.clear()


def test_the_table_of_rollouts_filters_and_sorts(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["both"].as_uri())
    section = page.locator("section", has=page.get_by_role("heading", name="Sampled rollouts"))
    rows = section.locator("tbody tr:visible")
    assert rows.count() == 80
    section.get_by_role("searchbox").fill("ANSWER 20")
    assert section.locator("output").inner_text() == f"{rows.count()} of 80 rows"
    assert all("answer 20" in text for text in rows.all_inner_texts())
    section.get_by_role("searchbox").fill("")
    assert rows.count() == 80
    values = "(table) => Array.from(table.tBodies[0].rows, (row) => Number(row.cells[1].dataset.value))"
    for order in (False, True):
        section.get_by_role("button", name="score", exact=True).click()
        found = section.locator("table").evaluate(values)
        assert found == sorted(found, reverse=order)
    assert section.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_long_texts_are_folded_until_they_are_asked_for(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["hostile"].as_uri(), width=400)
    cell = page.locator("table.clamped td.text div").last
    folded = cell.bounding_box()["height"]
    page.get_by_label("whole texts").check()
    page.locator("section").last.scroll_into_view_if_needed()
    assert page.locator("table.clamped").count() == 0
    assert folded <= 4 * 1.5 * 16


def test_the_other_run_can_be_hidden_and_shown(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["both"].as_uri())
    names = lambda: [trace["name"] for trace in traces(page, "Score") if trace["opacity"] == 1]  # noqa: E731
    assert names() == ["first", "second"]
    page.get_by_role("checkbox", name="second").uncheck()
    assert names() == ["first"]
    page.get_by_role("checkbox", name="second").check()
    assert names() == ["first", "second"]


def test_curves_are_smoothed_by_the_exponential_mean_with_its_start_corrected(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["both"].as_uri())
    page.get_by_label("smoothing").fill("0.8")
    raw, smooth = traces(page, "Score")[:2]
    expected = []
    for place in range(len(raw["y"])):
        weights = [0.8 ** (place - earlier) for earlier in range(place + 1)]
        expected.append(sum(w * y for w, y in zip(weights, raw["y"], strict=False)) / sum(weights))
    assert (raw["opacity"], smooth["y"]) == (0.3, pytest.approx(expected))
    page.get_by_label("smoothing").fill("0")
    assert [trace["y"] for trace in traces(page, "Score")][:1] == [raw["y"]]


def test_everything_that_acts_is_reached_by_the_keyboard_and_shows_it(open_page: Open, reports: dict[str, Path]):
    page = open_page(reports["both"].as_uri())
    wanted = page.evaluate("document.querySelectorAll('a, button, input, summary').length")
    hidden = page.evaluate("document.querySelectorAll('details:not([open]) :is(a, button, input)').length")
    reached: list[str] = []
    for _ in range(wanted + 200):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(() => { const at = document.activeElement; if (!at.matches('a, button, input, summary')) return ''; "
            "const all = Array.from(document.querySelectorAll('a, button, input, summary')); "
            "return all.indexOf(at) + (getComputedStyle(at).outlineStyle === 'none' ? ' without outline' : ''); })()"
        )
        if name and name in reached:  # around again
            break
        reached += [name] if name else []
    assert not [name for name in reached if "without" in name]
    assert len(reached) == wanted - hidden
    header = page.locator("section", has=page.get_by_role("heading", name="Sampled rollouts")).get_by_role(
        "button", name="score"
    )
    header.focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort='ascending']").count() == 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, RunServer, threading.Thread]]:
    run = write_run(tmp_path / "run", steps=15)
    with RunServer(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield run, server, thread
        server.shutdown()
        thread.join()


def test_the_live_page_follows_the_run_and_leaves_the_reader_where_they_were(
    open_page: Open, served: tuple[Path, RunServer, threading.Thread]
):
    run, server, _ = served
    page = open_page(server.address)
    assert len(traces(page, "Score")[0]["y"]) == 15
    section = page.locator("section", has=page.get_by_role("heading", name="Sampled rollouts"))
    section.get_by_role("searchbox").fill("answer 15")
    section.get_by_role("button", name="step", exact=True).click()
    section.get_by_role("button", name="step", exact=True).click()
    page.get_by_label("smoothing").fill("0")
    page.locator("summary", has_text="config.yaml").click()
    page.get_by_text("Live: this page follows the run.").wait_for()
    where = page.evaluate("window.scrollY")
    sink = MetricsSink(run)
    sink.write(16, {"objective/scores": 0.75, "time/step": 7.0})
    page.get_by_text("Finished after 16 steps").wait_for(timeout=15_000)
    assert page.evaluate("window.scrollY") == where
    assert section.get_by_role("searchbox").input_value() == "answer 15"
    assert page.locator("details[open] summary", has_text="config.yaml").count() == 1
    shown = section.locator("tbody tr:visible")
    assert all("answer 15" in text for text in shown.all_inner_texts())
    assert shown.count() < section.locator("tbody tr").count()
    assert section.locator("th[aria-sort='descending']").count() == 1
    score = traces(page, "Score")
    assert score[0]["y"][-1] == 0.75
    sink.write(17, {"objective/scores": 0.5, "reward/new_part": 1.0})
    page.get_by_role("heading", name="reward/new_part").wait_for(timeout=15_000)
    assert page.get_by_label("smoothing").input_value() == "0"
    assert len(traces(page, "Score")[0]["y"]) == 17


def test_the_live_page_says_when_its_server_has_ended(open_page: Open, tmp_path: Path):
    run = write_run(tmp_path / "run", steps=3)
    with RunServer(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = open_page(server.address, width=400, scheme="dark")
        page.get_by_text("Live: this page follows the run.").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        found = axe.Axe().run(page, context={"exclude": [[".svg-container"]]}).response["violations"]
        assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
        server.shutdown()
        thread.join()
    page.get_by_text("The server has ended").wait_for(timeout=15_000)
    assert page.get_by_role("heading", name="PPO: first").is_visible()
    complaints = open_page.complaints  # type: ignore[attr-defined]
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in complaints)
    complaints.clear()
