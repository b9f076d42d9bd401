"""Reading through Ray Data gives the samples, the report and the mistakes that one process gives."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrlhf.config.data import PreferenceDataSection, SupervisedDataSection
from rayrlhf.data.row_slices import slice_lines
from rayrlhf.data.supervised.datasets import load_preference_data, load_supervised_data
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.tuning import ray_data_reader as reading
from rayrlhf.tuning.ray_data_reader import over_cluster, through_ray_data
from tests.data.hub_folder import write_hub_folder
from tests.data.supervised.test_step_rows import ROW as STEPS
from tests.data.supervised.test_step_rows import load as load_steps

ROWS = 10_000


def section(kind, path, subset=None, **data):
    train = {"path": str(path), "subset": subset}
    return kind.model_validate({"train": train, "max_length": 64, "overlong": "drop", **data})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_equal_samples(found, expected):
    assert [sample.row for sample in found] == [sample.row for sample in expected]
    for name in ("token_ids", "loss_mask"):
        left, right = ([getattr(sample, name) for sample in samples] for samples in (found, expected))
        assert [len(part) for part in left] == [len(part) for part in right]
        np.testing.assert_array_equal(np.concatenate(left), np.concatenate(right))


@pytest.mark.usefixtures("cluster")
def test_samples_and_their_report_are_those_of_one_process(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {number}", "completion": str(number) * (1 + number % 23)} for number in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1500)
    files = [write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet"]
    hub = write_hub_folder(tmp_path / "some" / "set", rows, shards=3)
    for path, subset in [*((file, None) for file in files), (hub, "main")]:
        data = section(SupervisedDataSection, path, subset, evaluation_share=0.1)
        found, expected = (load_supervised_data(data, byte_tokenizer(), *spread) for spread in ([over_cluster], []))
        for here, there in zip(found, expected, strict=True):
            assert_equal_samples(here.samples, there.samples)
            assert here.report == there.report
            assert here.groups == there.groups
        assert expected[0].report.dropped


@pytest.mark.usefixtures("cluster")
def test_pairs_keep_their_margins_and_their_format(tmp_path):
    rows = [{"prompt": "a", "chosen": f"b{number}", "rejected": "c", "margin": number / 7} for number in range(5000)]
    data = section(PreferenceDataSection, write(tmp_path / "rows.jsonl", rows), system_prompt="d")
    found, expected = (load_preference_data(data, byte_tokenizer(), *spread)[0] for spread in ([over_cluster], []))
    for side in ("chosen", "rejected"):
        assert_equal_samples(*([getattr(pair, side) for pair in dataset.samples] for dataset in (found, expected)))
    np.testing.assert_allclose([pair.margin for pair in found.samples], [pair.margin for pair in expected.samples], rtol=1e-6)
    assert found.format == expected.format


@pytest.mark.usefixtures("cluster")
def test_a_bad_row_is_the_same_line_as_in_one_process_and_nothing_else_is_printed(tmp_path, capfd):
    rows = [{"prompt": "a", "completion": "b"}] * 4999 + [{"prompt": "a", "completion": 3}]
    data = section(SupervisedDataSection, write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError) as here:
        load_supervised_data(data, byte_tokenizer())
    with pytest.raises(UserError) as there:
        load_supervised_data(data, byte_tokenizer(), over_cluster)
    assert str(there.value) == str(here.value)
    assert "rows.jsonl: row 5000: completion: expected text" in str(there.value)
    assert "Traceback" not in capfd.readouterr().err


def test_parts_are_handed_out_in_order_and_as_soon_as_they_may():
    handed = []

    def parts():
        for index in (2, 0, 1, 3):
            yield index, b"%d" % index
            handed.append(index)

    ordered = reading._in_order(parts())
    assert next(ordered) == b"0"
    assert handed == [2]
    assert list(ordered) == [b"1", b"2", b"3"]


def test_a_node_that_does_not_see_the_file_is_named_with_what_to_do(tmp_path):
    (one,) = slice_lines("rows.jsonl", write(tmp_path / "rows.jsonl", [{"prompt": "a"}]), None)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl: not there on the node .*, or set data.reader=driver"):
        reading._encode({"index": 0, "slice": pickle.dumps(one)}, lambda slice_: list(slice_.chunks()))


def test_large_files_go_through_ray_data_unless_said_otherwise(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    assert not through_ray_data(section(SupervisedDataSection, path))
    assert through_ray_data(section(SupervisedDataSection, path, reader="ray"))
    monkeypatch.setattr(reading, "LARGE_BYTES", path.stat().st_size)
    assert through_ray_data(section(SupervisedDataSection, path))
    assert through_ray_data(section(SupervisedDataSection, "some/hub-name", evaluation={"path": str(path)}))
    assert not through_ray_data(section(SupervisedDataSection, path, reader="driver"))
    assert not through_ray_data(section(SupervisedDataSection, "some/hub-name"))
    assert not through_ray_data(section(SupervisedDataSection, tmp_path / "gone.jsonl"))


def test_steps_keep_their_labels_on_the_way_from_another_process(tmp_path):
    dataset = load_steps(tmp_path, [STEPS, STEPS | {"labels": [False, True]}])
    found = reading._unpack(reading._pack(dataset))
    assert (found.groups, found.report, found.format) == (dataset.groups, dataset.report, dataset.format)
    for one, other in zip(found.samples, dataset.samples, strict=True):
        for field in ("token_ids", "loss_mask", "right"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
