"""Stages in order, skipped when done, refused when changed; the stages themselves are stand-ins."""

import pytest

from rayrlhf.chain import run as chain_run
from rayrlhf.chain.stages import STAGES
from rayrlhf.config.chain import ChainConfig
from rayrlhf.errors import UserError

MODEL = "builtin:tiny?layers=1&hidden=64&context=64"


class StandIn:
    """A stage that notes its configuration and fails where it is told to."""

    def __init__(self, stage, calls, fails):
        self.config, self.outputs = stage.config, stage.outputs
        self._calls, self._fails = calls, fails

    def run(self, config):
        self._calls.append(config)
        if config.run.name in self._fails:
            raise UserError("not today")
        return f"headline of {config.run.name}"


@pytest.fixture
def stage(monkeypatch):
    """Stand-ins for two kinds, and what they were called with."""
    calls, fails = [], set()
    for kind in ("sft", "evaluate"):
        monkeypatch.setitem(chain_run.STAGES, kind, StandIn(STAGES[kind], calls, fails))
    monkeypatch.setattr(chain_run, "connected", lambda address: chain_run.nullcontext())
    return calls, fails


def chain(folder, steps=3):
    sft = {"model": {"path": MODEL}, "data": {"train": {"path": "builtin:sums"}}, "train": {"steps": steps}}
    judged = {
        "model": {"path": "${tuned.export}"},
        "data": {"path": "builtin:sums"},
        "reward": {"functions": [{"name": "gsm8k"}]},
    }
    return ChainConfig.model_validate(
        {
            "run": {"root": str(folder)},
            "stages": [
                {"name": "tuned", "kind": "sft", "settings": sft},
                {"name": "judged", "kind": "evaluate", "settings": judged},
            ],
        }
    )


def test_a_later_stage_gets_what_an_earlier_one_will_have_made(stage, tmp_path):
    calls, _ = stage
    reports = chain_run.run_chain(chain(tmp_path), tmp_path)
    assert [report.headline for report in reports] == ["headline of tuned", "headline of judged"]
    assert calls[1].model.path == str(tmp_path / "chain" / "tuned" / "export")
    assert chain_run.summary(reports)[-1] == "0.0 minutes in all stages"


def test_finished_stages_are_skipped_and_an_unfinished_one_is_run_again(stage, tmp_path):
    calls, fails = stage
    fails.add("judged")
    with pytest.raises(UserError, match="not today"):
        chain_run.run_chain(chain(tmp_path), tmp_path)
    fails.clear()
    reports = chain_run.run_chain(chain(tmp_path), tmp_path)
    assert [report.skipped for report in reports] == [True, False]
    assert [config.run.name for config in calls] == ["tuned", "judged", "judged"]


def test_a_finished_stage_with_another_configuration_is_refused_before_anything_runs(stage, tmp_path):
    calls, _ = stage
    chain_run.run_chain(chain(tmp_path), tmp_path)
    calls.clear()
    with pytest.raises(UserError, match=r"stage tuned was finished with another configuration \(train\.steps: 3 -> 4\)"):
        chain_run.run_chain(chain(tmp_path, steps=4), tmp_path)
    assert calls == []


def test_a_stage_with_a_wrong_key_is_refused_before_the_first_one_runs(stage, tmp_path):
    config = chain(tmp_path)
    config.stages[1].settings["rollout"] = {"temprature": 1}
    with pytest.raises(UserError, match="temprature"):
        chain_run.run_chain(config, tmp_path)
    assert stage[0] == []
