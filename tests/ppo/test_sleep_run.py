"""A run whose replicas sleep while the models train: asleep at every update, awake with the new weights at every sampling."""

import pytest
import ray

from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


class AtUpdates(Callback):
    """Asks a replica at the beginning of every update whether it can sample."""

    def __init__(self):
        self.answers = []

    def on_start(self, trainer):
        updater, replica = trainer._driver._updater, trainer.actor_groups["rollout"].handles[0]
        update = updater.update

        def asking(experience, step):
            try:
                ray.get(replica.submit.remote([], 1.0, 1))
                self.answers.append("awake")
            except RuntimeError as error:
                self.answers.append("asleep" if "sleeps" in str(error) else str(error))
            return update(experience, step)

        updater.update = asking


@pytest.mark.slow
def test_replicas_are_asleep_at_every_update_and_sample_from_the_new_weights_afterwards(tmp_path):
    config = run_config(tmp_path, "rollout.sleep=true", "critic.kind=shared", "run.steps=3")
    asked = AtUpdates()
    train_ppo(config, [asked])
    assert asked.answers == ["asleep"] * 3
    rows = [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]
    assert len(rows) == 3
    assert all(row[LOGPROB_GAP] < 1e-3 for row in rows)
    assert all(row["time/sleep"] >= 0 for row in rows)
