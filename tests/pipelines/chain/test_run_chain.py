"""The whole chain with stages that only take notes: the plan, the order, what a rerun skips, and what it refuses."""

import io
import json
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.config.tuning import SFTConfig
from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain import run_chain as module
from rayrlhf.pipelines.chain.run_chain import load_chain, plan_chain, run_chain, summary
from rayrlhf.pipelines.chain.stages import StageType

CHAIN = """
run: {name: small, root: ROOT}
stages:
  - name: first
    kind: sft
    config: tuning.yaml
    settings: {train: {steps: 5}}
  - name: judged
    kind: evaluate
    settings:
      model: {path: "${first.export}"}
      data: {path: "builtin:sums"}
      reward: {functions: [{name: gsm8k}]}
  - name: second
    kind: sft
    config: tuning.yaml
    settings: {model: {path: "${first.export}"}}
"""
TUNING = """
model: {path: "builtin:tiny"}
data: {train: {path: rows.jsonl}}
train: {learning_rate: 1.0e-3, steps: 2}
"""


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "tuning.yaml").write_text(TUNING)
    (tmp_path / "chain.yaml").write_text(CHAIN.replace("ROOT", str(tmp_path / "runs")))

    def load(*overrides):
        return load_chain(tmp_path / "chain.yaml", overrides), tmp_path

    return load


@pytest.fixture
def started(monkeypatch):
    """Stages that note their configuration instead of working; Ray is not asked for."""
    notes = []

    def run(config):
        notes.append(config)
        return f"stage {len(notes)} went well"

    stages = {"sft": StageType(SFTConfig, run), "evaluate": StageType(EvaluateConfig, run, export="")}
    monkeypatch.setattr("rayrlhf.pipelines.chain.run_chain.STAGES", stages)
    monkeypatch.setattr("rayrlhf.pipelines.chain.run_chain.connected", lambda address: nullcontext())
    return notes


def run_quietly(config, base):
    return run_chain(config, base, Console(file=io.StringIO()))


def test_the_plan_settles_every_stage_before_the_first_one_runs(chain, tmp_path):
    first, judged, second = plan_chain(*chain())
    assert first.config.run.folder == first.folder == tmp_path / "runs" / "small" / "first"
    assert (first.config.train.steps, first.config.train.learning_rate) == (5, 1e-3)
    assert second.config.train.steps == 2
    assert judged.config.model.path == second.config.model.path == str(first.folder / "export")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.settings.model.path=${judged.export}", "stage 'judged' has no output 'export'; expected one of folder"),
        ("stages.0.settings.model.path=${second.export}", r"\$\{second.export\}: no stage 'second' before this one"),
        ("stages.2.settings.train.stepz=3", "stage second: .*train.stepz"),
        ("stages.2.config=tunign.yaml", r"tunign\.yaml"),
        ("stages.1.name=first", "duplicate name 'first'"),
    ],
)
def test_a_mistake_in_any_stage_is_found_before_the_first_one_runs(override, message, chain, started, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run_quietly(*chain(override))
    assert "\n" not in str(caught.value)
    assert started == []
    assert not (tmp_path / "runs").exists()


def test_stages_run_in_order_and_a_rerun_skips_them_all(chain, started, tmp_path):
    reports = run_quietly(*chain())
    assert [config.run.name for config in started] == ["first", "judged", "second"]
    assert [report.skipped for report in reports] == [False] * 3
    again = run_quietly(*chain())
    assert len(started) == 3
    assert [report.skipped for report in again] == [True] * 3
    assert [report.headline for report in again] == [f"stage {number} went well" for number in (1, 2, 3)]
    assert [report.seconds for report in again] == [report.seconds for report in reports]
    assert summary(again)[1] == "judged: stage 2 went well (done before)"
    assert summary(again)[-1].endswith("minutes in all stages")


def test_a_chain_that_failed_goes_on_at_the_stage_that_failed(chain, started, monkeypatch, tmp_path):
    def fail(config):
        raise UserError("no")

    whole = dict(module.STAGES)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=count(0, 10).__next__))
    monkeypatch.setitem(module.STAGES, "evaluate", StageType(EvaluateConfig, fail, export=""))
    for _ in range(2):
        with pytest.raises(UserError, match=r"^no$"):
            run_quietly(*chain())
    assert [config.run.name for config in started] == ["first"]
    monkeypatch.setattr(module, "STAGES", whole)
    reports = run_quietly(*chain())
    assert [report.skipped for report in reports] == [True, False, False]
    assert [report.seconds for report in reports] == [10, 30, 10]  # of the second stage two runs failed
    assert [path.name for path in (tmp_path / "runs" / "small").glob("*.spent.json")] == []
    assert [config.run.name for config in started] == ["first", "judged", "second"]


def test_a_finished_stage_with_another_configuration_is_refused(chain, started, tmp_path):
    run_quietly(*chain())
    with pytest.raises(UserError, match=r"stage first was finished with another configuration \(train\.steps: 5 -> 6\)"):
        run_quietly(*chain("stages.0.settings.train.steps=6"))
    assert len(started) == 3


def test_a_stage_whose_mark_was_removed_runs_again_and_the_others_do_not(chain, started, tmp_path):
    run_quietly(*chain())
    mark = tmp_path / "runs" / "small" / "second.done.json"
    assert json.loads(mark.read_text())["headline"] == "stage 3 went well"
    mark.unlink()
    assert [report.skipped for report in run_quietly(*chain())] == [True, True, False]


def test_ray_is_started_only_where_a_stage_is_left_that_needs_it(chain, started, monkeypatch, tmp_path):
    run_quietly(*chain())
    monkeypatch.setattr("rayrlhf.pipelines.chain.run_chain.connected", None)
    (tmp_path / "runs" / "small" / "judged.done.json").unlink()
    assert [report.skipped for report in run_quietly(*chain())] == [True, False, True]


def test_the_arithmetic_example_plans_with_the_stages_it_promises():
    example = Path(__file__).parents[3] / "examples" / "arithmetic"
    planned = plan_chain(load_chain(example / "chain.yaml"), example)
    assert [stage.section.kind for stage in planned] == ["sft", "evaluate", "reward", "ppo", "evaluate"]
    policy = next(stage for stage in planned if stage.section.kind == "ppo").config
    assert policy.reward.functions == []
    assert policy.reward.model.model.path.endswith("reward/export")
