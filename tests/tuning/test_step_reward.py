"""Process reward models on Ray Train: the plan, settings of the other kind, and a run."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.config.tuning import RewardTrainingConfig
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.engines.scoring.reward_model import check_reward_models
from rayrlhf.errors import UserError
from rayrlhf.tuning.train_model import check_reward, train_reward
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
        (["model.head_dtype=float32"], r"head_dtype 'float32' of builtin:tiny\S* has no effect"),
    ],
)
def test_settings_of_the_other_kind_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        process_config(tmp_path, *overrides)


@pytest.mark.slow
def test_a_run_learns_the_steps_and_stores_their_separator(tmp_path, cluster):
    result = train_reward(process_config(tmp_path, "data.step_separator=' ;'", "train.steps=60", "train.learning_rate=3e-3"))
    assert result.metrics["evaluation/accuracy"] == 1.0
    assert result.metrics["evaluation/frequent_label_accuracy"] == pytest.approx(2 / 3)
    assert AnswerFormat.read(result.export) == AnswerFormat(step_separator=" ;")
    model = ModelSection(path=str(result.export), dtype="float32")
    section = RewardModelSection.model_validate({"model": model, "steps": {"aggregate": "min"}})
    check_reward_models(section)
    found = RewardEnsemble(section).score(["is it 3?"] * 2, ["3 yes ;yes", "3 yes ;no"])
    assert found[0] > 0.5 > found[1]
    with pytest.raises(UserError, match=r"a process reward model, which scores steps; set reward\.model\.steps"):
        check_reward_models(RewardModelSection(model=model))
