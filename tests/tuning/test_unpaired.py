"""KTO on Ray Train: it begins as its reference and learns which answers are desirable."""

import json

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.tuning.train_model import check_dpo, train_dpo
from tests.tuning.runs import SETTINGS


def kto_config(folder, *overrides):
    path = folder / "answers.jsonl"
    rows = [
        {"prompt": f"is it {number}?", "completion": "yes" if number % 2 else "no", "label": bool(number % 2)}
        for number in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.train.path={path}", f"run.root={folder / 'runs'}", "train.loss=kto"]
    return load_config(DPOConfig, None, [*SETTINGS, *own, *overrides])


def test_the_plan_names_the_loss(tmp_path):
    plan = check_dpo(kto_config(tmp_path, "train.undesirable_weight=1.5"))
    assert "loss: KTO per answer (beta 0.1, weights 1 and 1.5), reference: the initial model" in plan


@pytest.mark.slow
def test_a_run_begins_at_half_and_learns_the_labels(tmp_path, cluster):
    result = train_dpo(kto_config(tmp_path))
    rows = read_metrics(result.folder)
    assert next(row["loss"] for row in rows if "loss" in row) == pytest.approx(0.5, abs=1e-5)
    evaluations = [row for row in rows if "evaluation/loss" in row]
    assert evaluations[0]["evaluation/loss"] == pytest.approx(0.5, abs=1e-6)
    assert result.metrics["evaluation/accuracy"] == 1.0
    assert result.metrics["evaluation/loss"] < 0.45
