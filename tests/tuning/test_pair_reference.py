"""What DPO asks the first weights: once, before training, with adapters off; and that a step with it moves what it should."""

import math

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.tuning.direct_preference_task import FOLDER, DirectPreferenceTask
from tests.tuning.runs import SETTINGS, write_rows

pytestmark = pytest.mark.usefixtures("alone")


def started(folder, *overrides):
    """Task, engine before its first step, and pairs to train on."""
    rows = [{"prompt": f"is it {number}?", "chosen": "yes, it is", "rejected": "no"} for number in range(12)]
    path = write_rows(folder / "pairs.jsonl", rows)
    task = DirectPreferenceTask(load_config(DPOConfig, None, [*SETTINGS, f"data.train.path={path}", *overrides]))
    table, _, _ = task.load(load_tokenizer(task.config.model))
    return task, TrainEngine(task.spec(6)), table


def steps(task, engine, table, count):
    batch = task.batch(table.take(range(len(table))))
    return [engine.update(batch, UpdatePlan([[range(len(batch))]]), task.objective) for _ in range(count)]


@pytest.mark.parametrize("overrides", [(), ("model.lora={rank: 4}",)], ids=["whole", "adapters"])
def test_the_reference_is_the_model_that_training_begins_with_even_while_adapters_learn(tmp_path, overrides):
    task, engine, bare = started(tmp_path, *overrides)
    table = task.prepare(engine, bare, tmp_path)
    model = load_causal_model(task.config.model)
    for pair in table.take(range(3)):
        for answer, found in zip((pair.chosen, pair.rejected), pair.reference, strict=True):
            ids = torch.from_numpy(answer.token_ids.astype(np.int64))
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert found == pytest.approx(float(logprobs[torch.from_numpy(answer.loss_mask[1:])].sum()), abs=1e-4)
    if overrides:
        steps(task, engine, table, 3)
        (tmp_path / "later").mkdir()
        later = task.prepare(engine, bare, tmp_path / "later")
        np.testing.assert_allclose(later.references, table.references, rtol=0, atol=1e-6)


def test_the_numbers_are_read_where_they_lie_and_not_made_again_from_moved_weights(tmp_path):
    task, engine, bare = started(tmp_path)
    table = task.prepare(engine, bare, tmp_path)
    steps(task, engine, table, 2)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    np.testing.assert_array_equal(task.prepare(engine, bare, tmp_path).references, table.references)


def test_training_begins_at_the_loss_of_a_coin_and_its_rewards_part(tmp_path):
    task, engine, bare = started(tmp_path)
    table = task.prepare(engine, bare, tmp_path)
    before, _ = task.evaluate(engine, table)
    reports = steps(task, engine, table, 6)
    after, _ = task.evaluate(engine, table)
    assert task.loss(reports[0].metrics) == pytest.approx(math.log(2), abs=1e-5)
    assert (before["evaluation/margin"], before["evaluation/accuracy"]) == (0.0, 0.0)
    assert after["evaluation/accuracy"] == 1.0
    assert after["evaluation/reward_chosen"] > after["evaluation/reward_rejected"] + 0.5
    assert after["evaluation/loss"] < math.log(2) - 0.2


def test_without_a_reference_nothing_is_asked_and_rewards_are_log_probs(tmp_path):
    task, engine, bare = started(tmp_path, "train.reference=none")
    assert task.prepare(engine, bare, tmp_path) is bare
    assert not (tmp_path / FOLDER).exists()
    assert task.evaluate(engine, bare)[0]["evaluation/reward_chosen"] < -1.0
