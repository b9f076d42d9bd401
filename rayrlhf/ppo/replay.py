"""Replay of a recorded step, without sampling: `rayrlhf replay RUN --step N`.

The run's own driver executes the step on policy, critic, reference and teacher, from the newest checkpoint before it or the
start of the run. Recorded steps in between are executed first. Sequences, rewards and greedy responses are those of the
record. Only phase `sync` starts the replicas: they get the weights and sample the recorded responses again, from the same
seeds.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rayrlhf.actors.connection import connected, running_actor_groups
from rayrlhf.actors.model_loading import load_models
from rayrlhf.actors.placement import StatelessRole
from rayrlhf.config.loading.load import differences, load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.errors import UserError
from rayrlhf.models.load import resolve_dtype
from rayrlhf.observe.flight_record import FOLDER, StepRecord, listed, read_record, recorded_steps
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from rayrlhf.ppo.executed_step import SCORE, ExecutedStep, recorded_rollouts, sampled_again
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.model_updater import step_plan
from rayrlhf.ppo.rollout_collector import forward_passes
from rayrlhf.ppo.run_identity import MAY_CHANGE, fingerprint
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.ppo.step_comparison import (
    ENGINE,
    PLACED,
    TIMES,
    Compared,
    compare_experience,
    compare_inputs,
    compare_numbers,
    compare_samples,
    compare_scores,
    compare_update,
)
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.storage.manifest import DamagedError, fingerprint_differences, verify

Phases = Literal["score", "experience", "update", "sync", "all"]
TOLERANCES = {4: 1e-4, 2: 2e-2}
"""Bytes of the policy's dtype -> difference within tolerance, relative to numbers above 1."""
_RECORDED = ("data.", "reward.", "environment", "evaluation.", "sft_warmup", "rollout.")
"""Settings of what a replay takes from the record."""
_SAMPLED_AT = "rollout.temperature:"
_UNUSED: Mapping[str, tuple[StatelessRole, ...]] = {
    "update": ("rollout", "reward", "judge", "reference", "teacher"),
    "sync": ("reward", "judge", "reference", "teacher"),
}
"""Roles that a phase does not start; the others start neither replicas nor rewards."""


class MetricPair(NamedTuple):
    """A metric of the record, and of the replay with other settings."""

    name: str
    recorded: float | None
    replayed: float


@dataclass(frozen=True, slots=True)
class Replay:
    """Outcome of a replay.

    Attributes:
        step: the step, or an earlier one on the way that differs from its record.
        origin: the state that it began with.
        compared: comparisons in the order of the computation; empty with other settings.
        tolerance: see `TOLERANCES`.
        changes: settings that differ from the run's, as `key: old -> new`.
        metrics: metrics of record and replay; empty without other settings.
    """

    step: int
    origin: str
    compared: list[Compared]
    tolerance: float
    changes: list[str] = field(default_factory=list)
    metrics: list[MetricPair] = field(default_factory=list)

    @property
    def first_difference(self) -> Compared | None:
        """The first comparison beyond the tolerance."""
        return next((one for one in self.compared if one.verdict == "different"), None)

    def lines(self) -> list[str]:
        """Return the outcome as text."""
        head = f"step {self.step}, {self.origin}"
        if self.changes:
            width = max((len(pair.name) for pair in self.metrics), default=0)
            rows = [
                f"{pair.name:<{width}}  {_number(pair.recorded):>14}  {_number(pair.replayed):>14}" for pair in self.metrics
            ]
            return [
                f"{head}, with {'; '.join(self.changes)}",
                f"{'metric':<{width}}  {'recorded':>14}  {'replayed':>14}",
                *rows,
            ]
        width = max(len(one.item) for one in self.compared)
        rows = [f"{one.phase:<10}  {one.item:<{width}}  {one.verdict}: {one.where}" for one in self.compared]
        return [head, *rows, f"step {self.step}: {self._outcome()}"]

    def _outcome(self) -> str:
        first = self.first_difference
        if first is not None:
            return f"differs from its record; first in {first.phase}: {first.item}, {first.where}"
        if any(one.verdict == "within tolerance" and one.item != ENGINE for one in self.compared):
            return f"equals its record within {self.tolerance:g}"
        return "equals its record bit for bit"


def replay_step(
    run: Path,
    step: int,
    phase: str = "all",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Execute a recorded step again, and compare it with its record.

    Args:
        run: the run folder.
        step: steps done after it, as in `metrics.jsonl`.
        phase: `score` computes the outputs of the models, `experience` advantages from the recorded outputs (without a model),
            `update` experience and optimizer steps, `all` these three. `sync` samples on the replicas.
        overrides: `section.key=value` each. Other settings than the run's give its metrics next to the recorded ones.
        say: called with lines about waits.

    Raises:
        UserError: no such run or record, a damaged one, no state to begin with, or settings that a replay cannot change.
    """
    if phase not in get_args(Phases):
        near = difflib.get_close_matches(phase, get_args(Phases), n=1)
        raise UserError(
            f"--phase {phase}: expected score, experience, update, sync or all{f'; did you mean {near[0]}?' if near else ''}"
        )
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder; expected one with config.yaml")
    stored, config = (load_config(PPOConfig, run / "config.yaml", given) for given in ((), overrides))
    changes = _changes(stored, config)
    if changes and phase in ("score", "sync"):
        raise UserError(f"--set compares metrics, of which phase {phase} has none; expected experience, update or all")
    if phase == "sync" and (config.environment is not None or config.trains_without_demonstrations):
        given = "turns of an environment or agent" if config.environment is not None else "prompts with their demonstrations"
        raise UserError(f"--phase sync: the record does not hold the {given}; expected score, experience, update or all")
    if not recorded_steps(run / FOLDER):
        raise UserError(f"{run} has no records of steps: expected a run with observe.record=light or full")
    record = read_record(run / FOLDER, step)
    if changes and phase in ("experience", "update"):
        _check_recorded(config, record, changes, phase)
    if phase == "sync" and not sampled_again(record, recorded_rollouts(record).rollouts):
        raise UserError(
            f"--phase sync, step {step}: no response was sampled with the step's initial weights alone; expected another step"
        )
    moved = [line for line in differences(stored, config) if line.startswith(("placement.", "rollout.replicas:"))]
    replayer = _Replayer(run, config, changes, moved=bool(moved))
    return replayer.experience(record) if phase == "experience" else replayer.on_models(record, phase, say)


class _Replayer:
    """Executes and compares the steps of one replay; observes the steps of its driver.

    Args:
        moved: the processes are not the run's, so that sums differ by rounding.
    """

    def __init__(self, run: Path, config: PPOConfig, changes: list[str], *, moved: bool) -> None:
        self._run = run
        self._config = config
        self._changes = changes
        self._moved = moved
        self.weights = True
        self._executed: list[ExecutedStep] = []
        self._tolerance = TOLERANCES[resolve_dtype(config.model.dtype).itemsize]
        self._rows = {row["step"]: row for row in read_metrics(run) if "episode" in row}

    def __call__(self, executed: ExecutedStep) -> None:
        self._executed.append(executed)

    @property
    def _same_batches(self) -> bool:
        """True if the replicas sample the recorded responses in the batches of the run."""
        more = self._config.needs_greedy or self._config.rollout.refill_rounds
        return self._config.run.determinism == "exact" and not self._moved and not more

    def experience(self, record: StepRecord) -> Replay:
        """Make the experience of a step from the recorded outputs of the models."""
        scored = recorded_rollouts(record)
        maker = ExperienceMaker(self._config)
        maker.load_state_dict(self._state(record.header["state"]))
        experience = maker.make(scored)
        plan = step_plan(self._config, experience, record.step - 1)
        version = int(record.header["version"])
        executed = ExecutedStep(record.step, version, (), {}, {}, scored, experience, plan, {}, {}, {}, experience.metrics)
        return self._outcome(record, "from its recorded outputs of the models", scored, executed)

    def _state(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the KL coefficient and running moments to begin with.

        Other settings of the KL replace its coefficient.
        """
        if any(line.startswith("algorithm.kl.") for line in self._changes):
            return dict(stored) | {"controller": ExperienceMaker(self._config).state_dict()["controller"]}
        return dict(stored)

    def on_models(self, record: StepRecord, phase: str, say: Callable[[str], None]) -> Replay:
        """Execute a step on the run's models, after the recorded steps since the checkpoint."""
        self.weights = "after" in record.header
        start = _start(self._run, self._config, record.step, alone=bool(self._changes))
        first = start.step + 1 if start else 1
        records = [read_record(self._run / FOLDER, step) for step in range(first, record.step)]
        origin = f"from {start.folder.name}" if start else "from the start of the run"
        origin += f" over steps {listed([earlier.step for earlier in records])}" if records else ""
        with self._driver(record, _UNUSED.get(phase, ("rollout", "reward", "judge")), say) as driver:
            if start:
                state = load_checkpoint(start, driver.actor_groups, self._config.deadlines.update)
                own = {"sampler": driver.sampler.state_dict(), "experience": self._state(state["experience"])}
                driver.load_state(state | own | {"stream": None})  # no prompts are drawn
            for earlier in records:
                say(f"step {earlier.step}")
                driver.step(recorded_rollouts(earlier))
                outcome = self._outcome(earlier, origin, None, self._executed.pop())
                if outcome.first_difference:
                    return outcome
            say(f"step {record.step}")
            scored = recorded_rollouts(record)
            if phase == "sync":
                again = driver.sample(sampled_again(record, scored.rollouts), self._config.rollout.temperature)
                found = compare_samples(record, scored.rollouts, again, self._tolerance, exact=self._same_batches)
                return Replay(record.step, origin, found, self._tolerance)
            rescored = driver.rescore(scored) if phase != "update" else None
            if phase == "score":
                return self._outcome(record, origin, scored, None, rescored)
            driver.step(rescored or scored)
            return self._outcome(record, origin, scored, self._executed.pop(), rescored)

    def _outcome(
        self,
        record: StepRecord,
        origin: str,
        scored: ScoredRollouts | None,
        executed: ExecutedStep | None,
        rescored: ScoredRollouts | None = None,
    ) -> Replay:
        """Compare the executed part of a step with its record."""
        row, tolerance = self._rows.get(record.step, {}), self._tolerance
        if self._changes:
            metrics = executed.metrics if executed else {}
            names = [name for name in metrics if not name.startswith(TIMES)]
            pairs = [MetricPair(name, row.get(name), float(metrics[name])) for name in sorted(names)]
            return Replay(record.step, origin, [], tolerance, self._changes, pairs)
        if executed is not None and self._moved:
            rest = {name: value for name, value in executed.metrics.items() if not name.endswith(PLACED)}
            executed = replace(executed, before={}, after={}, metrics=rest)
        found: list[Compared] = []
        if scored is not None:
            found += compare_inputs(self._config, record, scored)
        if scored is not None and rescored is not None:
            found += compare_scores(self._config, record, scored, tolerance, rescored)
        if executed is not None:
            made = executed.experience.metrics
            own = TOLERANCES[4] if rescored is None else tolerance  # float32, from the record's numbers or the models' again
            found += compare_experience(record, executed, own)
            found += compare_numbers("experience", row, made, own, "metrics")
            found += compare_update(record, executed, tolerance) if executed.reports else []
            rest = {name: value for name, value in executed.metrics.items() if name not in made}
            found += compare_numbers("update", row, rest, tolerance, "metrics")
        return Replay(record.step, origin, found, tolerance)

    @contextmanager
    def _driver(self, record: StepRecord, without: Sequence[StatelessRole], say: Callable[[str], None]) -> Iterator[StepDriver]:
        """Start the models that a step needs, without some roles."""
        rollout = self._config.rollout.model_copy(
            update={"weight_transfer": "shared_memory", "sleep": False, "mismatch_alarm": float("inf")}
        )
        run = self._config.run.model_copy(update={"name": f"{self._config.run.name}-replay"})
        config = self._config.model_copy(update={"run": run, "rollout": rollout})
        prompts = list(recorded_rollouts(record).prompts.values())
        with (
            connected(config.placement.address),
            running_actor_groups(config, say, without) as actor_groups,
        ):
            say("loading the models")
            load_models(actor_groups, config.deadlines.start)
            yield StepDriver(config, actor_groups, PromptSampler(prompts, seed=config.run.seed), observer=self)


def _changes(stored: PPOConfig, config: PPOConfig) -> list[str]:
    """Return the settings that make a step another one.

    Raises:
        UserError: one of what the record holds.
    """
    changes = [line for line in differences(stored, config) if not line.startswith(MAY_CHANGE)]
    for line in changes:
        if line.startswith(_RECORDED) and not line.startswith(_SAMPLED_AT):
            raise UserError(
                f"--set {line.partition(':')[0]}: has no effect, because prompts, responses and rewards come from the record; "
                "expected a setting of algorithm, train, critic, or rollout.temperature"
            )
    return changes


def _check_recorded(config: PPOConfig, record: StepRecord, changes: Sequence[str], phase: str) -> None:
    """Check that the recorded outputs of the models serve other settings too.

    Raises:
        UserError: the settings change them, or need those of another model.
    """
    known = {path.partition("/")[0] for path in record.under(SCORE)}
    needed = {one.name for one in forward_passes(config, (), has_critic=config.critic.kind == "separate")}
    if needed - known or any(line.startswith(_SAMPLED_AT) for line in changes):
        raise UserError(
            f"--phase {phase} reads the recorded outputs of the models, which {'; '.join(changes)} changes; expected "
            "--phase all"
        )


def _start(run: Path, config: PPOConfig, step: int, *, alone: bool) -> Checkpoint | None:
    """Return the newest whole checkpoint that recorded steps connect with a step.

    None is the start of the run.

    Args:
        alone: only one directly before the step.

    Raises:
        UserError: there is none.
    """
    recorded = set(recorded_steps(run / FOLDER))
    found = list_checkpoints(run / "checkpoints")
    starts: list[Checkpoint | None] = [one for one in reversed(found) if one.step < step]
    starts += [None] if config.sft_warmup is None else []
    lines: list[str] = []
    for checkpoint in starts:
        done = checkpoint.step if checkpoint else 0
        if not recorded.issuperset(range(done + 1, step)) or (alone and done != step - 1):
            continue
        if checkpoint is None:
            return None
        try:
            differing = fingerprint_differences(verify(checkpoint.folder).fingerprint, fingerprint(config))
        except DamagedError as error:
            lines.append(f"; {checkpoint.folder.name} is damaged: {error}")
            continue
        if differing:
            raise UserError(f"checkpoint {checkpoint.folder} does not fit these settings ({'; '.join(differing[:5])})")
        return checkpoint
    known = [*(checkpoint.step for checkpoint in found), *([0] if config.sft_warmup is None else [])]
    possible = [one for one in sorted(recorded) if _reachable(one, known, recorded, alone=alone)]
    raise UserError(
        f"step {step}: no checkpoint {'directly ' if alone else ''}before it to begin with{''.join(lines)}; steps that can be "
        f"replayed{' with other settings' if alone else ''}: {listed(possible)}"
    )


def _reachable(step: int, known: Sequence[int], recorded: set[int], *, alone: bool) -> bool:
    return any(done < step and recorded.issuperset(range(done + 1, step)) and (not alone or done == step - 1) for done in known)


def _number(value: Any) -> str:
    return "null" if value is None else f"{value:.6g}"
