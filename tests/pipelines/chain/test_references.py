"""References in a chain's settings: replaced wherever they stand, and every wrong one named."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain.run_chain import fill_in, load_chain, plan_chain

OUTPUTS = {"sft": {"folder": "/runs/sft", "export": "/runs/sft/export"}}


def test_a_reference_is_replaced_at_any_depth_and_inside_a_text():
    settings = {"model": {"path": "${sft.export}"}, "list": [{"x": "a${sft.folder}b"}], "number": 3, "none": None}
    assert fill_in(settings, OUTPUTS, "stage ppo") == {
        "model": {"path": "/runs/sft/export"},
        "list": [{"x": "a/runs/sftb"}],
        "number": 3,
        "none": None,
    }


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${stf.export}", "stage ppo.model.path: ${stf.export}: no stage 'stf' before this one; did you mean sft?"),
        ("${sft.exprot}", "stage 'sft' has no output 'exprot'; did you mean export?"),
        ("${sft}", "stage 'sft' has no output ''; expected one of folder, export"),
    ],
)
def test_a_wrong_reference_names_its_place_and_the_nearest_right_one(reference, message):
    with pytest.raises(UserError) as caught:
        fill_in({"model": {"path": reference}}, OUTPUTS, "stage ppo")
    assert message in str(caught.value)


def test_a_stage_that_builds_data_names_its_file_for_those_that_train_on_it(tmp_path):
    text = """
run: {name: context}
stages:
  - {name: build, kind: icl-build, settings: {model: {path: builtin:tiny}, data: {path: builtin:mappings}}}
  - {name: sft, kind: sft, settings: {model: {path: builtin:tiny}, data: {train: {path: "${build.dataset}"}}}}
  - {name: distill, kind: icl-distill, settings: {model: {path: "${sft.export}"}, data: {path: builtin:mappings}}}
  - {name: last, kind: sft, settings: {model: {path: "${distill.export}"}, data: {train: {path: "${distill.dataset}"}}}}
"""
    (tmp_path / "chain.yaml").write_text(text)
    planned = plan_chain(load_chain(tmp_path / "chain.yaml", [f"run.root={tmp_path}"]), tmp_path)
    assert planned[1].config.data.train.path == str(tmp_path / "context" / "build" / "dataset.parquet")
    assert planned[2].config.model.path == str(tmp_path / "context" / "sft" / "export")
    assert planned[3].config.model.path == str(tmp_path / "context" / "distill" / "student" / "export")
    assert planned[3].config.data.train.path == str(tmp_path / "context" / "distill" / "dataset.parquet")
