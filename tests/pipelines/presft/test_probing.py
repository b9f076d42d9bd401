"""Probes are scored as configured, and a dataset that is mostly unusable costs no process."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.batch_inference.ingest import GIVEN
from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.batch_inference.source import row_schema
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.pipelines import ProbeSection
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft import run_presft as run
from rayrlhf.pipelines.presft.probing import ProbeScorer, correlation, given_probes, schemas
from tests.pipelines.presft.runs import presft_config

DATA = PairsSection(path="pairs")


def probed(responses, probes):
    rows = [
        dict.fromkeys(schemas()["probed"].names)
        | {"row": index, "source": index + 1, "prompt": "p", "response": response, "columns": "{}"}
        | {"probes": texts, "probe_finish": ["stop"] * len(texts), "probe_tokens": [1] * len(texts)}
        for index, (response, texts) in enumerate(zip(responses, probes, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=schemas()["probed"])


@pytest.mark.parametrize(("how", "combine"), [("mean", np.mean), ("max", max)])
def test_several_probes_give_their_scores_and_one_number(how, combine):
    originals = ["3 + 4 = 7. Answer: 7", "nothing alike"]
    probes = [["3 + 4 = 7. Answer: 7", "3 + 4 = 8. Answer: 8", ""], ["a", "b", "nothing alike at all"]]
    section = ProbeSection(samples=3, temperature=1.0, aggregate=how, tokenize="intl")
    rows = ProbeScorer(section, DATA, None)(probed(originals, probes)).to_pylist()
    for row, original, texts in zip(rows, originals, probes, strict=True):
        expected = BleuScorer("intl").scores(texts, original)
        assert row["probe_bleu"] == expected
        assert row["bleu"] == pytest.approx(combine(expected), abs=1e-12)
        assert (row["model"], row["likelihood"]) == ("given", None)


def test_given_responses_stand_in_for_sampled_ones_at_no_cost():
    row = dict.fromkeys(row_schema().names) | {"row": 0, "columns": json.dumps({GIVEN: "mine"})}
    (result,) = given_probes(pa.Table.from_pylist([row], schema=row_schema())).to_pylist()
    assert (result["probes"], result["probe_tokens"]) == (["mine"], [0])


def test_a_correlation_is_pearsons_and_none_where_there_is_none():
    first, second = [1.0, 2.0, 4.0, 3.0], [2.0, 1.0, 5.0, 9.0]
    centred = [np.array(values) - np.mean(values) for values in (first, second)]
    expected = np.prod(centred, axis=0).sum() / np.sqrt(np.prod([(values**2).sum() for values in centred]))
    assert correlation(first, second) == pytest.approx(expected)
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert correlation([1.0], [1.0]) is None


def test_too_many_bad_rows_stop_the_run_before_anything_is_started(tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("something was started")

    monkeypatch.setattr("rayrlhf.actors.connection.connected", refuse)
    config = presft_config(tmp_path)
    with Path(config.data.path).open("a") as file:
        file.write('{"prompt": "without completion"}\n' * 5)
    with pytest.raises(UserError, match="5 of 55 rows are unusable"):
        run.run_presft(config)
