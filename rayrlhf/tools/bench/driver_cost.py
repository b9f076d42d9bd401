"""`rayrlhf bench driver`: the driver's cost per sample with thousands of samples and replicas.

The driver is the real one: prompt sampler, request queue, scoring, experience, update plan, weight sync, samples on disk. Only
the actors are simulated, by objects in this process with the same methods that return at once; results go through Ray's object
store as those of an actor. So all measured time is the driver's, except the creation of the results, which is timed and
subtracted. Two replicas are real actors.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import ray

from rayrlhf.actors.actor_group import ActorGroup
from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.placement import Role
from rayrlhf.actors.remote import Handle
from rayrlhf.actors.role_groups import GROUP_CLASSES
from rayrlhf.actors.worker import Worker
from rayrlhf.config.loading.load import dump_config, load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.data.fingerprints import row_fingerprints
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, Records, Rollout, RolloutRequest, TokenScores
from rayrlhf.engines.train.plan import TrainedRows, UpdatePlan, UpdateReport
from rayrlhf.observe.live import LiveView
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.rewards.score import RewardBatch

LONGEST = 64
"""Maximum response tokens; lengths are uniform between 1 and this."""
PROMPT_TOKENS = 64
REAL = 2
"""Number of replicas that are real processes, so that real calls are included."""
MAKING = "making results"


@dataclass(frozen=True, slots=True)
class DriverCost:
    """The driver's cost of one step.

    Attributes:
        seconds: of the step, without the time of simulated actors.
        microseconds: the same per sample.
        peak_gib: peak memory of the driver, without the mapped object store.
        phases: seconds by phase of the step, simulated actors included.
    """

    samples: int
    replicas: int
    seconds: float
    microseconds: float
    peak_gib: float
    phases: dict[str, float]


def bench_driver(sizes: Sequence[int], *, replicas: int, progress: Callable[[str], None] = lambda _: None) -> list[DriverCost]:
    """Take one step of each size, after a small warm-up step.

    Args:
        sizes: samples of a step.
    """
    found = []
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        _step(100, 4)
        for samples in sizes:
            cost = _step(samples, replicas)
            progress(
                f"{samples:,} samples on {replicas:,} replicas: {cost.microseconds:.0f} microseconds per sample, "
                f"{cost.seconds:.1f} s per step, driver at most {cost.peak_gib:.2f} GiB"
            )
            found.append(cost)
    finally:
        ray.shutdown()
    return found


def _step(samples: int, replicas: int) -> DriverCost:
    random = np.random.default_rng(0)
    stopwatch = _Stopwatch()
    prompts = [
        Prompt(number, f"prompt {number}", random.integers(3, 250, PROMPT_TOKENS, np.int32)) for number in range(samples)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = _config(samples, replicas, Path(folder))
        view = LiveView("bench", live=False)
        with Recorder(config, dump_config(config), lambda *_: [], view) as recorder:
            trainer = StepDriver(
                config,
                _actor_groups(replicas, stopwatch),
                PromptSampler(prompts, seed=0),
                (),
                recorder.timer,
                callbacks=[recorder],
            )
            recorder.resume(0)
            with _peak() as peak:
                started = time.perf_counter()
                metrics = trainer.train_step()
                seconds = time.perf_counter() - started - stopwatch.seconds
    phases = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    phases[MAKING] = stopwatch.seconds
    return DriverCost(samples, replicas, seconds, 1e6 * seconds / samples, peak[0] / GIB, phases)


def _config(samples: int, replicas: int, folder: Path) -> PPOConfig:
    return load_config(
        PPOConfig,
        None,
        [
            "model.path=none",
            "data.train.path=none",
            "reward.functions=[{name: format, arguments: {pattern: x}}]",
            f"rollout={{prompts_per_step: {samples}, max_new_tokens: {LONGEST}, replicas: {replicas}}}",
            f"run={{name: bench, root: {json.dumps(str(folder))}, steps: 1}}",
            "train.epochs=4",
            "observe.tensorboard=false",
            "observe.samples_per_step=0",  # their tokens are decoded, and there is no model whose tokenizer could
        ],
    )


class _Stopwatch:
    """Sums the time of simulated actors."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def simulated(self, function: Callable[..., Any]) -> Any:
        """Simulate an actor's method: `.remote(...)` returns at once, through the object store."""

        def remote(*arguments: object) -> ray.ObjectRef:
            # The driver serializes a call's arguments, which is its own cost; the actor serializes the result.
            ray.cloudpickle.dumps(arguments, protocol=5)
            started = time.perf_counter()
            result = ray.put(function(*arguments))
            self.seconds += time.perf_counter() - started
            return result

        return SimpleNamespace(remote=remote)


class _Replica:
    """A rollout replica that has every response ready."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._requests: list[RolloutRequest] = []

    def begin_weights(self, version: int) -> None:
        pass

    def finish_weights(self) -> None:
        pass

    def receive_weights(self, bucket: list[Any]) -> None:
        pass

    def submit(self, requests: Sequence[RolloutRequest], _temperature: float, _limit: int) -> None:
        self._requests += requests

    def poll(self, minimum: int, _seconds: float | None = None) -> tuple[Records[Rollout], int]:
        taken, self._requests = self._requests[:minimum], self._requests[minimum:]
        return Records(self._rollout(request) for request in taken), len(self._requests)

    def _rollout(self, request: RolloutRequest) -> Rollout:
        length = int(self._random.integers(1, LONGEST + 1))
        return Rollout(
            request.key,
            request.prompt_ids,
            self._random.integers(3, 250, length, np.int32),
            np.ones(length, np.bool_),
            np.full(length, -1.0, np.float32),
            np.zeros(length, np.int32),
            "stop",
            "x" * length,
            request.seed,
        )


def _actor_groups(replicas: int, stopwatch: _Stopwatch) -> ActorGroups:
    def handle(**methods: Callable[..., Any]) -> Any:
        return SimpleNamespace(**{name: stopwatch.simulated(method) for name, method in methods.items()})

    def rollout(seed: int) -> Any:
        if seed < REAL:
            return ray.remote(_Replica).options(num_cpus=0).remote(seed)
        replica = _Replica(seed)
        methods = ("submit", "poll", "begin_weights", "receive_weights", "finish_weights")
        return handle(**{name: getattr(replica, name) for name in methods})

    policy = handle(score=_read, update=_update, sync_dtype=lambda: "float32")
    policy.weights = SimpleNamespace(remote=lambda *_: _no_weights.remote())
    handles: dict[Role, tuple[Handle[Worker], ...]] = {
        "policy": (policy,),
        "critic": (handle(score=_read, update=_update),),
        "reference": (handle(score=_read),),
        "reward": (handle(score=_judge),),
        "rollout": tuple(rollout(seed) for seed in range(replicas)),
    }
    groups: dict[Role, ActorGroup[Worker]] = {
        role: GROUP_CLASSES[role](role, tuple(f"bench/{role}/{rank}" for rank in range(len(mine))), mine)
        for role, mine in handles.items()
    }
    plan = cast(Any, SimpleNamespace(overlap=True))
    specs = cast(Any, SimpleNamespace(weight_transfer="shared_memory", serves_adapters=False))
    return ActorGroups(groups, plan, {}, specs, "bench", {})


@ray.remote(num_cpus=0, num_returns="streaming")
def _no_weights() -> Iterator[list[Any]]:
    yield []


def _update(batch: ray.ObjectRef, plan: UpdatePlan, _: object) -> UpdateReport:
    values = ray.get(batch)
    prints = row_fingerprints(values, range(len(values)))
    steps = [list(rows) for epoch in plan.epochs for rows in epoch]
    trained = [TrainedRows(number, tuple(rows), prints[rows], {}, {}, {}, 0.0) for number, rows in enumerate(steps)]
    return UpdateReport({}, [1.0], [1e-6], len(steps), len(plan.epochs), False, 0, 0, 1, 1, 0.0, 0.0, {}, trained=trained)


def _read(sequences: Sequence[Any], outputs: frozenset[str], *_: object) -> Records[TokenScores]:
    scores: Records[TokenScores] = Records()
    for sequence in sequences:
        logprobs = np.full(sequence.response_length, -1.0, np.float32) if "logprobs" in outputs else None
        values = np.zeros(sequence.response_length + 1, np.float32) if "values" in outputs else None
        scores.append(TokenScores(logprobs, None, values))
    return scores


def _judge(_: Sequence[Prompt], rollouts: Sequence[Rollout]) -> RewardBatch:
    scores = np.array([rollout.response_ids[0] / 250 for rollout in rollouts], np.float32)
    return RewardBatch(scores, {"length": scores})


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list with this process's peak private memory in bytes, sampled at 10 Hz."""
    import threading

    largest, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            memory = psutil.Process().memory_info()
            largest[0] = max(largest[0], memory.rss - memory.shared)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        over.set()
        thread.join()
