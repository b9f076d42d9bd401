"""The page of a run, from its folder alone: whole, going, broken, hostile."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.errors import UserError
from rayrlhf.observe.journal import RecoveryJournal
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.observe.samples import SampleSink
from rayrlhf.tools.report.curve_catalog import Curve
from rayrlhf.tools.report.difference_causes import flat
from rayrlhf.tools.report.metric_series import Series
from rayrlhf.tools.report.run_blocks import kl_class
from rayrlhf.tools.report.run_curves import curve_figure
from rayrlhf.tools.report.run_page import live_page, write_run_report
from rayrlhf.tools.report.run_view import kind_of, read_run
from tests.observe.html.test_page import outline
from tests.tools.report.runs import HOSTILE, sample, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def page_of(folder: Path, **options: Path) -> str:
    return write_run_report(folder, **options).read_text(encoding="utf-8")


def charts(page: str) -> dict[str, dict[str, object]]:
    """Title of each chart -> its figure."""
    found = re.findall(r'<h3>([^<]*)</h3><div class="plot"[^>]*data-figure="([^"]*)"', page)
    stored = {name: re.search(f'id="{name}">(.*?)</script>', page, re.DOTALL)[1] for _, name in found}
    return {title: json.loads(stored[name]) for title, name in found}


def test_a_finished_run_is_told_from_reward_to_configuration(run: Path):
    page = page_of(run)
    text = outline(page).text
    for words in (
        "PPO: first",
        "Finished after 20 steps",
        "Reward and quality",
        "Time by role and phase",
        "Answers before and after",
        "KL from the reference by token",
        "Sampled rollouts",
        "All 80 rollouts in the run folder.",
        "a processor",
        "coefficient: 0.1",
    ):
        assert words in text
    assert "Parts of this run cannot be shown" not in text
    drawn = charts(page)
    for title in ("Score", "KL from the reference", "Entropy", "Response length", "Clipped ratios", "Explained variance"):
        assert title in drawn
    for title in (
        "Log-prob gap, mean",
        "Staleness",
        "Peak memory so far",
        "Seconds per response",
        "The last steps, role by role",
    ):
        assert title in drawn
    assert drawn["Seconds per response"]["data"][0]["y"] == [7 / 40] * 20
    assert "reward/sums" in drawn


def test_the_change_on_held_out_prompts_is_stated_with_its_interval(run: Path):
    text = outline(page_of(run)).text
    assert re.search(r"8 held-out prompts, answered after step 0 and after step 20: mean score .*\(95 % interval", text)


def test_another_run_is_drawn_over_and_its_settings_are_compared(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "second", name="second", steps=12, seed=1)
    page = page_of(run, compare=other, output=tmp_path / "both.html")
    score = charts(page)["Score"]["data"]
    assert [(trace["name"], trace["compare"], len(trace["x"])) for trace in score] == [
        ("first", False, 20),
        ("second", True, 12),
    ]
    assert "setting that differs" in page
    assert ">run.steps<" in page
    assert 'id="compare"' in page
    assert write_run_report(run, compare=other) == run / "report-against-second.html"
    rows = [row for row in page.split("<tr>") if 'data-label="difference"' in row or " and 12<" in row]
    at_12, last = (next(row for row in rows if f"<div>{label}</div>" in row) for label in ("score", "score, last"))
    assert "<div>12</div>" in at_12
    assert "<div>20 and 12</div>" in last
    first, second = (read_run(folder).series["objective/scores"].values[11] for folder in (run, other))
    assert re.findall(r'data-value="([^"]*)"', at_12) == [str(value) for value in (first, second, first - second)]


@pytest.mark.parametrize(("value", "span"), [(3e-6, [0, 6e-6]), (-0.5, [-1.0, 0]), (0.0, None)])
def test_a_constant_is_drawn_at_its_height(value: float, span: list[float] | None):
    constant, rising = Series([1, 2, 3], [value] * 3), Series([1, 2], [value, value + 1])
    curve = Curve("lr", "Learning rate", "rate", "")
    assert curve_figure(curve, [{"lr": constant}], ["one"])["layout"]["yaxis"].get("range") == span
    assert "range" not in curve_figure(curve, [{"lr": constant}, {"lr": rising}], ["one", "two"])["layout"]["yaxis"]


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Path, tmp_path: Path):
    twin = write_run(tmp_path / "elsewhere" / "first")
    page = page_of(run, compare=twin, output=tmp_path / "both.html")
    names = [trace["name"] for trace in charts(page)["Score"]["data"]]
    assert names[1] == "first (elsewhere)"
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.jsonl", "metrics.jsonl is missing or empty: no curves"),
        ("config.yaml", "config.yaml is missing: the settings are unknown"),
        ("environment.json", "environment.json is missing: machine and versions are unknown"),
        ("trace.json", "trace.json is missing or empty: no timeline"),
        ("samples", "no sampled responses: no table of rollouts"),
    ],
)
def test_a_missing_part_is_named_and_the_rest_is_shown(run: Path, tmp_path: Path, name: str, said: str):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    text = outline(page_of(folder)).text
    kind_is_known = name != "config.yaml"
    assert said in text
    assert "first" in text if kind_is_known else "Score" in text


def test_damage_in_every_file_leaves_a_page_that_names_it(run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"step": 21, "objective/sc')
    (folder / "config.yaml").write_text("run: [")
    (folder / "trace.json").write_text('[\n{"ph": "X"},\n')
    (folder / "samples" / "step-000003.parquet").write_bytes(b"torn")
    (folder / "evaluation" / "step-000020.parquet").write_bytes(b"")
    (folder / "environment.json").write_text("{")
    (folder / "recovery.jsonl").write_text('{"event": "lost"')
    text = outline(page_of(folder)).text
    assert "metrics.jsonl: 1 damaged line left out" in text
    assert "metrics.jsonl: the last line is incomplete and left out" in text
    assert "config.yaml is damaged: shown unchanged" in text
    assert "trace.json: 1 damaged line left out" in text
    assert "1 files of samples cannot be read" in text


def test_a_run_that_still_goes_says_how_far_it_is(run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "export")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:7]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert "Running, at step 7 of 20" in outline(page_of(folder)).text


def test_hostile_text_adds_no_element_wherever_it_stands(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=3, hostile=True)
    RecoveryJournal(folder).write("lost", HOSTILE, HOSTILE, 1.0)
    page = page_of(folder)
    assert "\0" not in page
    found = outline(page)
    assert not [tag for tag, _ in found.elements if tag == "img"]
    assert not [attributes for _, attributes in found.elements if any(name.startswith("on") for name in attributes)]
    kinds = {attributes.get("type") for tag, attributes in found.elements if tag == "script"}
    own = [attributes for tag, attributes in found.elements if tag == "script" and not attributes.get("type")]
    assert (kinds, len(own)) == ({None, "application/json"}, 2), "the library and the page's own script"


def test_an_sft_run_and_an_evaluation_are_shown_by_the_same_template(tmp_path: Path):
    tuning = tmp_path / "sft"
    tuning.mkdir()
    (tuning / "config.yaml").write_text("run: {name: tuned}\ntrain: {steps: 5}\nworkers: {}\nmodel: {path: m}\n")
    sink = MetricsSink(tuning)
    for step in range(1, 6):
        sink.write(step, {"loss": 1 / step, "grad_norm": 1.0})
    page = page_of(tuning)
    assert "SFT: tuned" in page
    assert {"Training loss", "Gradient norm"} <= set(charts(page))
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "config.yaml").write_text("run: {name: judged}\nrollout: {}\ntemperature: 0\n")
    (judged / "evaluation.json").write_text('{"score": {"mean": 0.5, "low": 0.4, "high": 0.6}}')
    SampleSink(judged / "answers").write(0, [sample(0, 1, random.Random(0), score=0.25)])
    text = outline(page_of(judged)).text
    assert "evaluation: judged" in text
    assert "0.500 [0.400, 0.600]" in text
    assert "Answers" in text


@pytest.mark.parametrize(
    ("section", "kind"),
    [("algorithm", "PPO"), ("probe", "Pre-SFT"), ("export_anyway", "reward model"), ("workers", "SFT"), ("x", "run")],
)
def test_the_kind_of_a_run_is_told_by_its_configuration(section: str, kind: str):
    assert kind_of({section: {}}) == kind


def test_a_dpo_run_is_told_from_sft_by_its_beta():
    assert kind_of({"workers": {}, "train": {"beta": 0.1}}) == "DPO"


def test_a_folder_without_a_run_is_refused_and_the_runs_below_it_are_named(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no run here.*runs below it: .*first"):
        read_run(run.parent)
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_the_command_writes_the_page_where_it_says(run: Path, tmp_path: Path):
    target = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(run), "--compare", str(run), "--output", str(target)])
    assert result.exit_code == 0, result.output
    assert str(target) in result.output.replace("\n", "")
    assert target.stat().st_size > 1_000_000


def test_a_live_page_links_the_library_and_asks_only_its_own_server(run: Path):
    page = live_page(run, max_rollouts=10)
    assert len(page) < 1_000_000
    assert '<script src="plotly.js"></script>' in page
    assert "connect-src 'self'" in page


def test_settings_are_flattened_as_yaml_would_write_them():
    assert flat({"a": {"b": None, "c": [1, 2]}, "d": "x", "e": True}) == {"a.b": "null", "a.c": "[1, 2]", "d": "x", "e": "true"}


@pytest.mark.parametrize(
    ("nats", "style"), [(0.0, "level"), (0.04, "level"), (-0.05, "down-1"), (0.3, "up-2"), (-5.0, "down-3")]
)
def test_a_tokens_color_says_direction_and_strength(nats: float, style: str):
    assert kl_class(nats) == style
