"""Which samples make up which optimizer step: a pure function of (run seed, step)."""

import numpy as np

from rayrlhf.engines.train_engine import UpdatePlan


def plan_update(samples: int, epochs: int, mini_batch_size: int, run_seed: int, step: int) -> UpdatePlan:
    """Shuffle the step's samples anew for each epoch and cut them into optimizer steps of `mini_batch_size`."""
    random = np.random.default_rng((run_seed, step))
    plan = []
    for _ in range(epochs):
        order = random.permutation(samples).tolist()
        plan.append([order[start : start + mini_batch_size] for start in range(0, samples, mini_batch_size)])
    return UpdatePlan(plan)
