"""The datasheet adds up, and the report shows it; both are made as far as a run has come."""

import json

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.loading.load import dump_config
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.dataset import repair
from rayrlhf.pipelines.presft.datasheet import rft_tokens, write_datasheet
from rayrlhf.pipelines.presft.presft_folder import Layout
from rayrlhf.pipelines.presft.presft_report import MAX_STRUGGLING, read_round, write_presft_report, write_report
from rayrlhf.pipelines.presft.probing import schemas
from tests.pipelines.presft.runs import presft_config

ROWS = 300


def row(index):
    struggling = index % 4 == 0
    guarded = index % 40 == 0
    values = dict.fromkeys(schemas()["relabeled"].names)
    values |= {"row": index, "source": index + 1, "prompt": f"prompt {index}", "response": f"original {index}", "columns": "{}"}
    values |= {"probes": [f"probe {index}"], "probe_finish": ["stop"], "probe_tokens": [5], "probe_bleu": [100.0 - index % 4]}
    values |= {"bleu": index / 10 if struggling else 100.00000000000004, "model": "tuned", "sampling": '{"seed": 0}'}
    values |= {"struggling": struggling, "guarded": guarded, "decision": "replace" if struggling and not guarded else "keep"}
    values |= {"reason": "guarded: empty" if guarded else "r", "new_response": f"<b>new {index}</b>" if struggling else None}
    return values | {"new_tokens": 7 if struggling else 0, "candidates": [], "candidate_scores": [], "refusals": []}


@pytest.fixture
def finished(tmp_path):
    config = presft_config(tmp_path)
    layout = Layout(tmp_path / "run")
    folder = layout.round(1)
    layout.rows.path.mkdir(parents=True)
    layout.rows.seal({"rows": ROWS, "read": ROWS + 2, "rejected": {"no field prompt": 2}, "fingerprint": None})
    for part in range(3):
        rows = [row(index) for index in range(part * 100, part * 100 + 100)]
        folder.scores.write(part, pa.Table.from_pylist(rows, schema=schemas()["scores"]))
        folder.relabeled.write(part, pa.Table.from_pylist(rows, schema=schemas()["relabeled"]))
    mean = sum(row(index)["bleu"] for index in range(ROWS)) / ROWS
    folder.scores.seal(
        {"rows": ROWS, "signature": "tok:13a", "mean_bleu": mean, "mean_chrf": 61.25, "zero_bleu": 1, "probe_tokens": 5 * ROWS}
    )
    return config, layout


def test_decisions_tokens_and_shares_add_up(finished):
    config, layout = finished
    folder = layout.round(1)
    folder.relabeled.seal({"method": "mbr"})
    repair(folder.relabeled, folder.repaired)
    sheet = write_datasheet(config, layout)
    assert json.loads((layout.path / "datasheet.json").read_text()) == sheet
    (figures,) = sheet["rounds"]
    assert figures["decisions"] == {"keep": 233, "replace": 67}
    assert figures["struggling"] == 75
    assert figures["guarded"] == {"guarded: empty": 8}
    assert figures["tokens"] == {"probe": 1500, "relabel": 525, "total": 2025, "rft_4": 6000, "rft_8": 12000}
    assert figures["repaired_rows"] == ROWS
    assert sheet["dataset"]["rejected"] == {"no field prompt": 2}


def test_the_report_shows_decisions_pairs_and_costs_as_text(finished):
    config, layout = finished
    layout.round(1).relabeled.seal({"method": "mbr"})
    write_report(config, layout, write_datasheet(config, layout))
    page = (layout.path / "report.html").read_text()
    assert "&lt;b&gt;new 0&lt;/b&gt;" in page
    assert "<b>new" not in page
    for words in (
        "Pairs by score",
        "Score and length",
        "Decisions",
        "Tokens sampled",
        "original 0",
        "guarded: empty",
        "34%",
        "61.2",
        "share no word, for 1 of 300 pairs",
    ):
        assert words in page
    assert page.count('<article class="pair">') == 10


def test_scores_alone_make_a_report_too(finished):
    config, layout = finished
    write_report(config, layout, write_datasheet(config, layout))
    page = (layout.path / "report.html").read_text()
    assert "Pairs by score" in page
    assert "Decisions" not in page


def test_the_report_says_how_likelihood_goes_with_bleu_and_what_the_repair_brought(finished):
    config, layout = finished
    scores = layout.round(1).scores
    sheet = write_datasheet(config, layout)
    write_report(config, layout, sheet)
    assert "Pearson" not in (layout.path / "report.html").read_text()
    scores.seal(scores.facts() | {"likelihood_correlation": 0.4241})
    sheet = write_datasheet(config, layout)
    sheet["losses"] = {"tuned": {"loss": 1.25}, "round-1/tuned": {"loss": 0.75}}
    sheet["quality"] = [
        {"model": model, "rows": 40, "bleu": 50.0, "score": score}
        for model, score in (("tuned", 0.5), ("round-1/tuned", 0.875))
    ]
    sheet["rounds"].append(sheet["rounds"][0] | {"likelihood_correlation": None})
    write_report(config, layout, sheet)
    page = (layout.path / "report.html").read_text()
    for words in (
        "correlates with BLEU at 0.42 (Pearson)",
        "Round 1: Scores of the pairs",
        "0.5 → 0.875",
        "1.25",
        "0.75",
    ):
        assert words in page


def test_every_pair_is_in_the_histogram_and_the_lowest_come_first(finished):
    _, layout = finished
    view = read_round(layout.round(1), {"rows": ROWS})
    assert sum(view.counts) == ROWS
    assert view.counts[-1] == 225
    learned = [index for index in range(ROWS) if index % 4]
    assert [row["row"] for row in view.lowest] == [*range(0, ROWS, 4), *learned[: MAX_STRUGGLING - 75]]
    assert len(view.lengths) == len(view.scores) == ROWS


def test_rejection_sampling_costs_k_responses_for_every_prompt():
    assert rft_tokens(100, 1000, 200) == {"rft_4": 2000, "rft_8": 4000}
    assert rft_tokens(100, 0, 100) == {"rft_4": None, "rft_8": None}


def test_the_report_command_tells_a_presft_run_by_its_own_page(finished, tmp_path):
    config, layout = finished
    (layout.path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match=r"no datasheet\.json yet"):
        write_presft_report(layout.path)
    layout.round(1).relabeled.seal({"method": "mbr"})
    write_datasheet(config, layout)
    target = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(layout.path), "--output", str(target)])
    assert result.exit_code == 0, result.output
    assert "Pairs by score" in target.read_text()
    assert not (layout.path / "report.html").exists()
    refused = CliRunner().invoke(app, ["report", str(layout.path), "--compare", str(layout.path)])
    assert isinstance(refused.exception, UserError)
    (layout.path / "datasheet.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_presft_report(layout.path)
