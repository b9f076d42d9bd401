"""Two hundred steps of a real run leave every process as large as it was after fifty."""

import psutil
import pytest
import ray

from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

STEPS, SETTLED = 200, 50
ALLOWED = 20 * 1024
"""Bytes a step."""


class Sizes(Callback):
    """Private memory of the driver and all actors after every step, by name."""

    def __init__(self):
        self.sizes = {}

    def on_start(self, trainer):
        self.processes = {"driver": psutil.Process()}
        for group in trainer.actor_groups.groups.values():
            for name, place in zip(group.names, ray.get([handle.ping.remote() for handle in group.handles]), strict=True):
                self.processes[name] = psutil.Process(place.pid)

    def on_step_end(self, step, metrics, scored):
        for name, process in self.processes.items():
            self.sizes.setdefault(name, []).append(process.memory_full_info().uss)


def slope(values):
    """Bytes a step by least squares, which a single late allocation does not decide."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((index - middle) * (value - mean) for index, value in enumerate(values))
    return above / sum((index - middle) ** 2 for index in range(len(values)))


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_no_process_grows_over_two_hundred_steps(tmp_path, backend):
    config = run_config(tmp_path, f"rollout.backend={backend}", f"run.steps={STEPS}", "evaluation.enabled=false")
    sizes = Sizes()
    train_ppo(config, [sizes])
    growth = {name: slope(values[SETTLED:]) for name, values in sizes.sizes.items()}
    print({name: f"{value / 1024:.1f} KiB a step" for name, value in growth.items()})
    assert {name: value for name, value in growth.items() if value > ALLOWED} == {}


def test_the_slope_is_that_of_a_line_and_survives_a_jump():
    assert slope([5.0 + 3 * index for index in range(150)]) == pytest.approx(3)
    assert slope([0.0] * 149 + [1e6]) < ALLOWED
