"""The configuration of DPO: its plan in words, what is refused, and its command."""

import pytest
import yaml

from rayrlhf.errors import UserError
from rayrlhf.tuning.train_model import check_dpo
from tests.tuning.runs import dpo_config


def test_the_plan_names_loss_and_reference(tmp_path):
    plan = check_dpo(dpo_config(tmp_path, "train.label_smoothing=0.1"))
    assert "loss: DPO per pair (sigmoid, beta 0.1, label smoothing 0.1), reference: the initial model" in plan
    assert "policy: builtin:tiny" in plan
    assert "longer" not in plan.splitlines()[-1]  # no length baseline: there is no reward model to beat it


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.label_smoothing=0.5", "train.label_smoothing"),
        ("train.loss=hinge", "train.loss"),
        ("data.overlong=truncate", "data.overlong truncate keeps the end"),
        ("train.center_coefficient=1", "unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        dpo_config(tmp_path, override)


def test_ipo_smooths_no_labels(tmp_path):
    with pytest.raises(UserError, match="no effect on loss ipo"):
        dpo_config(tmp_path, "train.loss=ipo", "train.label_smoothing=0.1")


def test_the_command_checks_a_file(tmp_path):
    from typer.testing import CliRunner

    from rayrlhf.cli import app

    config = dpo_config(tmp_path)
    file = tmp_path / "dpo.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    found = CliRunner().invoke(app, ["dpo", str(file), "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "optimizer steps: 6" in found.output
