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
        ("train.loss=hinges", "train.loss"),
        ("train={loss: simpo, reference: initial}", "reference initial has no effect on loss simpo"),
        ("train={loss: kto, reference: none}", "loss kto compares single answers with the initial policy"),
        ("train.desirable_weight=2", "desirable_weight and undesirable_weight have no effect on loss sigmoid; expected kto"),
        ("train.target_margin=1", "target_margin 1 has no effect on loss sigmoid; expected simpo"),
        ("data.overlong=truncate", "data.overlong truncate keeps the end"),
        ("train.center_coefficient=1", "unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        dpo_config(tmp_path, override)


@pytest.mark.parametrize("loss", ["ipo", "hinge", "apo_zero", "orpo"])
def test_some_losses_smooth_no_labels(tmp_path, loss):
    with pytest.raises(UserError, match=f"no effect on loss {loss}"):
        dpo_config(tmp_path, f"train.loss={loss}", "train.label_smoothing=0.1")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("orpo", "(orpo, beta 0.1) + 1 x negative log-likelihood of the chosen, reference: none"),
        ("simpo", "(simpo, beta 0.1), reference: none"),
        ("apo_down", "(apo_down, beta 0.1), reference: the initial model"),
    ],
)
def test_a_loss_brings_its_own_reference_and_likelihood(tmp_path, loss, words):
    assert f"loss: DPO per pair {words}" in check_dpo(dpo_config(tmp_path, f"train.loss={loss}"))


def test_the_command_checks_a_file(tmp_path):
    from typer.testing import CliRunner

    from rayrlhf.cli import app

    config = dpo_config(tmp_path)
    file = tmp_path / "dpo.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    found = CliRunner().invoke(app, ["dpo", str(file), "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "optimizer steps: 6" in found.output
