"""Rows in, scores, decisions and a repaired dataset out, through real stages on Ray."""

import os
import time

import pyarrow.parquet as pq
import pytest
import sacrebleu

from rayrlhf.batch_inference.ingest import ingest_dataset
from rayrlhf.batch_inference.part_pipeline import Limits, Pool, run_pipeline
from rayrlhf.errors import ActorLostError, DeadlineError, UserError
from rayrlhf.pipelines.presft.dataset import repair, write_dataset
from rayrlhf.pipelines.presft.presft_folder import Layout
from rayrlhf.pipelines.presft.presft_steps import (
    LabeledModel,
    low_score_warning,
    read_cut,
    relabel_pairs,
    score_pairs,
    select_pairs,
)
from rayrlhf.pipelines.presft.selection import Cut
from tests.pipelines.presft.runs import MODEL, presft_config

pytestmark = pytest.mark.usefixtures("small_ray")


def take(config, layout):
    field = config.probe.response_field
    part = config.pipeline.rows_per_part
    ingest_dataset(
        config.data, layout.rows, layout.rejected, rows_per_part=part, tokenizer=None, longest=None, given_field=field
    )


def score(config, layout, model=None):
    written = []
    score_pairs(config, layout.rows, layout.round(1).scores, model, config.probe, 2, written.append)
    return written


def test_given_responses_are_scored_selected_and_put_in_place_of_the_originals(tmp_path):
    config = presft_config(tmp_path, "probe.response_field=answer")
    layout = Layout(tmp_path / "run")
    folder = layout.round(1)
    take(config, layout)
    assert sorted(score(config, layout)) == [2, 16, 16, 16]
    rows = list(folder.scores.rows())
    assert [row["row"] for row in rows] == list(range(50))
    for row in rows:
        assert row["bleu"] == sacrebleu.sentence_bleu(row["probes"][0], [row["response"]]).score
        assert row["chrf"] == sacrebleu.sentence_chrf(row["probes"][0], [row["response"]]).score
    scored = folder.scores.facts()
    assert scored["mean_chrf"] == pytest.approx(sum(row["chrf"] for row in rows) / 50)
    assert scored["zero_bleu"] == sum(row["bleu"] == 0 for row in rows)
    facts = select_pairs(config, folder.scores, folder.selection)
    assert facts["selected"] == 17  # every third answer has no idea
    relabel_pairs(config, config.relabel, folder.scores, folder.relabeled, read_cut(folder.selection), None, 3, lambda _: None)
    decided = list(folder.relabeled.rows())
    assert [row["decision"] for row in decided] == ["keep" if row % 3 else "replace" for row in range(50)]
    assert repair(folder.relabeled, folder.repaired) == 50
    write_dataset(folder.repaired, folder.dataset)
    repaired = pq.read_table(folder.dataset).to_pylist()
    assert repaired[0] == {"prompt": "question 0?", "completion": "no idea about 0", "source": 1}
    assert repaired[1]["completion"] == "the answer to 1 is 7"
    assert decided[0]["response"] == "the answer to 0 is 0", "the original stays in the provenance"


@pytest.mark.parametrize(("zero", "warned"), [(5, False), (6, True)])
def test_scores_of_zero_for_most_pairs_are_named_with_what_to_check(zero, warned):
    warning = low_score_warning({"rows": 10, "zero_bleu": zero, "mean_chrf": 12.34})
    assert (warning is not None) == warned
    if warning:
        assert "6 of 10 pairs have BLEU 0" in warning


@pytest.mark.slow
def test_the_model_is_asked_twice_the_same_and_a_missing_part_comes_back_alike(tmp_path):
    config = presft_config(tmp_path, "probe.temperature=1.0", "probe.samples=2", "probe.likelihood=true", count=20)
    model = LabeledModel("tuned", config.model)
    layout = Layout(tmp_path / "run")
    take(config, layout)
    score(config, layout, model)
    scores = layout.round(1).scores
    before = {file.name: file.read_bytes() for file in scores.files()}
    first = list(scores.rows())
    assert len({text for row in first for text in row["probes"]}) > 20, "rows and samples have seeds of their own"
    assert all(row["likelihood"] < 0 and len(row["probe_bleu"]) == 2 for row in first)
    assert scores.facts()["probe_tokens"] == sum(sum(row["probe_tokens"]) for row in first)
    scores.part(1).unlink()
    (scores.path / "done.json").unlink()
    assert score(config, layout, model) == [4], "only the missing part is made"
    assert {file.name: file.read_bytes() for file in scores.files()} == before


@pytest.mark.slow
def test_parts_of_one_row_make_every_row_a_checkpoint(tmp_path):
    config = presft_config(tmp_path, "probe.temperature=1.0", "pipeline.rows_per_part=1", count=5)
    model = LabeledModel("tuned", config.model)
    layout = Layout(tmp_path / "run")
    take(config, layout)
    assert score(config, layout, model) == [1] * 5
    scores = layout.round(1).scores
    before = {file.name: file.read_bytes() for file in scores.files()}
    for row in (1, 4):
        scores.part(row).unlink()
    (scores.path / "done.json").unlink()
    assert score(config, layout, model) == [1, 1], "only the two missing rows are asked again"
    assert {file.name: file.read_bytes() for file in scores.files()} == before


@pytest.mark.slow
def test_struggling_pairs_alone_are_sampled_again(tmp_path):
    settings = ["probe.response_field=answer", f"probe.model.path={MODEL}", "relabel.method=mbr", "relabel.samples=3"]
    config = presft_config(tmp_path, *settings, count=6)
    layout = Layout(tmp_path / "run")
    take(config, layout)
    score(config, layout)
    folder = layout.round(1)
    model = LabeledModel("given", config.model)
    relabel_pairs(config, config.relabel, folder.scores, folder.relabeled, Cut(50.0), model, 3, lambda _: None)
    for row in folder.relabeled.rows():
        struggling = row["row"] % 3 == 0
        assert row["struggling"] == struggling
        assert len(row["candidates"]) == (3 if struggling else 0)
        assert (row["new_tokens"] > 0) == struggling


class Refuser:
    def __call__(self, table):
        raise UserError(f"row {table.column('row')[0].as_py()}: not like this")


class Broken:
    def __call__(self, table):
        return table.column("no such column")


class Stuck:
    def __call__(self, table):
        time.sleep(60)
        return table


class Dying:
    def __call__(self, table):
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (Refuser, UserError, "row 0: not like this"),
        (Broken, KeyError, "no such column"),
        (Stuck, DeadlineError, "no part was finished within 6 s"),
        (Dying, ActorLostError, "exceeded its restarts"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_goes_wrong_in_a_stage_arrives_as_what_it_is(tmp_path, worker, error, message):
    config = presft_config(tmp_path, "probe.response_field=answer", count=4)
    layout = Layout(tmp_path / "run")
    take(config, layout)
    pool = Pool("stage", worker, (), 1, 0.5)
    limits = Limits(1, 6.0 if worker is Stuck else 60.0)
    with pytest.raises(error, match=message) as raised:
        run_pipeline(layout.rows, layout.round(1).scores, [pool], limits, lambda _: None)
    assert error is KeyError or "\n" not in str(raised.value), "what is not a bug is one line"
    assert layout.round(1).scores.indices() == []
