"""Parameter groups of an optimizer."""

import pytest
import torch

from rayrlhf.config.train import OptimizerSection
from rayrlhf.engines.train.optimizers import RATE_FACTOR, build_optimizer


def groups(**head):
    trunk, head_layer = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    network = torch.nn.Sequential(trunk, head_layer)
    rates = {"head": head_layer.parameters(), **head} if head else {}
    optimizer = build_optimizer(network.parameters(), OptimizerSection(weight_decay=0.1), 1e-3, **rates)
    return [
        ([tuple(one.shape) for one in group["params"]], group["weight_decay"], group[RATE_FACTOR])
        for group in optimizer.param_groups
    ]


def test_matrices_decay_and_vectors_do_not():
    assert groups() == [([(3, 3), (1, 3)], 0.1, 1.0), ([(3,), (1,)], 0.0, 1.0)]


def test_a_head_has_a_learning_rate_of_its_own():
    factor = pytest.approx(0.1)
    assert groups(head_learning_rate=1e-4) == [
        ([(3, 3)], 0.1, 1.0), ([(3,)], 0.0, 1.0), ([(1, 3)], 0.1, factor), ([(1,)], 0.0, factor)
    ]  # fmt: skip
