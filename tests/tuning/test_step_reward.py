"""Process reward models on Ray Train: the plan, and settings of the other kind."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.tuning import RewardTrainingConfig
from rayrlhf.errors import UserError
from rayrlhf.tuning.train_model import check_reward
from tests.tuning.runs import SETTINGS, write_rows


def process_config(folder, *overrides):
    """A step is right where it says yes."""
    rows = [
        {"prompt": f"is it {number}?", "completions": [f"{number} yes", "no", "yes"], "labels": [True, False, True]}
        for number in range(96)
    ]
    path = write_rows(folder / "steps.jsonl", rows)
    own = [f"data.train.path={path}", f"run.root={folder / 'runs'}", "kind=process"]
    return load_config(RewardTrainingConfig, None, [*SETTINGS, *own, *overrides])


def test_the_plan_names_the_kind_and_the_format(tmp_path):
    plan = check_reward(process_config(tmp_path))
    assert "process reward model: builtin:tiny" in plan
    assert "read as steps with labels: completions, labels, prompt" in plan


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.center_coefficient=0.1"], "center_coefficient centers the rewards of pairs and has no effect on kind process"),
        (["kind=outcome", "data.step_separator=;"], "step_separator has no effect on kind outcome"),
    ],
)
def test_settings_of_the_other_kind_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        process_config(tmp_path, *overrides)
