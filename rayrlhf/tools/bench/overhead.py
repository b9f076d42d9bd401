"""`rayrlhf bench overhead`: share of a PPO step in which no actor computes.

Ray records the start and end of each actor call. On one machine the models run one after the other, so the time outside all
calls is messages, bookkeeping and waiting: the cost of the driver and of Ray. With concurrent roles this is a lower bound,
since a call may overlap another's overhead.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rayrlhf.tools.bench.paired import in_new_process
from rayrlhf.tools.bench.work import Critic, PPOWork

EXECUTE = "task:execute"
"""Ray's name of the event in which the code of a call runs."""


def idle_shares(windows: Sequence[tuple[float, float]], calls: Sequence[tuple[float, float]]) -> list[float]:
    """Return the share of each window that no call covers.

    Args:
        windows: start and end of each step.
        calls: start and end of each call, on the same clock, in any order; they may overlap.
    """
    shares = []
    for start, end in windows:
        covered, reached = 0.0, start
        for first, last in sorted(calls):
            first, last = max(first, reached), min(last, end)
            if last > first:
                covered += last - first
                reached = last
        shares.append(1.0 - covered / (end - start))
    return shares


def bench_overhead(
    work: PPOWork, *, critic: Critic, rounds: int, progress: Callable[[str], None] = lambda _: None
) -> list[float]:
    """Return the share of each timed step, of all rounds, in which no actor computed."""
    shares: list[float] = []
    for number in range(rounds):
        found = in_new_process(_run, work, critic)
        progress(f"round {number + 1} of {rounds}: {', '.join(f'{share:.1%}' for share in found)} of each step")
        shares += found
    return shares


def _run(work: PPOWork, critic: Critic) -> list[float]:
    # Ray's processes read these when they start.
    os.environ.update({"RAY_PROFILING": "1", "RAY_task_events_report_interval_ms": "200"})
    import time

    import ray

    from rayrlhf.ppo.callbacks import Callback
    from rayrlhf.ppo.train_ppo import train_ppo

    ends: list[float] = []
    events: list[Mapping[str, Any]] = []

    class Watch(Callback):
        def on_step_end(self, step: int, metrics: Mapping[str, float], scored: object) -> None:
            ends.append(time.time())

        def on_end(self, trainer: object) -> None:
            time.sleep(1.0)
            events.extend(ray.timeline())

    with tempfile.TemporaryDirectory() as name:
        work.write_prompts(Path(name))
        train_ppo(work.config(critic, Path(name)), [Watch()])
    calls = [(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events if event["cat"] == EXECUTE]
    return idle_shares(list(pairwise(ends)), calls)
