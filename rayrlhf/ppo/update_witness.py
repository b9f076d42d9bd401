"""Witness of an update: samples, optimizer steps and denominators. Pure.

Each sample must be in one optimizer step per epoch. The ranks report what their forward passes read. This is compared with the
driver's training batch. The counts are computed here again, by other code than in the engine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from rayrlhf.actors.placement import TrainRole
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.fingerprints import row_fingerprints
from rayrlhf.data.records import SampleKey
from rayrlhf.engines.objectives.base import responses_under
from rayrlhf.engines.train.plan import TrainedRows, UpdateReport
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.pair_batch import TrainedBatch
from rayrlhf.ppo.sample_ledger import fault

LOSS_TOLERANCE = 1e-4
"""Share of a loss's summands by which it may differ from their sum, which is a float32 sum in another order."""


class BatchFacts:
    """Training batch of a step as the driver made it.

    Attributes:
        keys: sample of each row.
        learnable: True for rows that are trained on, bool [B].
        fingerprints: uint64 [B].
    """

    def __init__(self, trained: TrainedBatch) -> None:
        rows = len(trained.keys)
        self.keys: Sequence[SampleKey] = trained.keys
        self.learnable = np.zeros(rows, np.bool_)
        self.learnable[[row for group in trained.groups for row in group]] = True
        self.fingerprints = row_fingerprints(trained.batch, range(rows))
        self._arrays = trained.batch.arrays
        self._counts: dict[str, NDArray[np.int64]] = {}

    def count(self, name: str, rows: NDArray[np.int64]) -> int:
        """Return a loss's denominator over some rows: positions under a mask, or responses with one."""
        if name not in self._counts:
            mask = name.removeprefix(responses_under(""))
            positions = np.count_nonzero(self._arrays[mask], axis=1)
            self._counts[name] = positions if name == mask else (positions > 0).astype(np.int64)
        return int(self._counts[name][rows].sum())


class UpdateWitness:
    """Checks the updates of a run, and counts the optimizer steps of each role."""

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        self._steps: dict[str, int] = {}
        self._known = True

    def check(self, step: int, role: TrainRole, reports: Sequence[UpdateReport], facts: BatchFacts) -> None:
        """Check the update of a role.

        Args:
            step: PPO steps done before it.
            reports: of all ranks.

        Raises:
            AlarmError: a row is missing, doubled or another one, a loss has another denominator, or an update came twice.
        """
        first = reports[0]
        self.count(step, role, first)
        epochs = self._config.train.epochs
        if any(report.epochs != first.epochs for report in reports) or (first.epochs != epochs and not first.stopped_early):
            found = ", ".join(sorted({str(report.epochs) for report in reports}))
            raise AlarmError(f"step {step + 1}: the {role} trained {found} epochs, expected {epochs}")
        parts = _shares(step, role, reports, facts)
        self._check_epochs(step, role, first.epochs, parts, facts)
        for number, mini_batch in groupby(parts, key=lambda part: part.mini_batch):
            self._check_mini_batch(_Place(step, role, number + 1), list(mini_batch), facts)

    def state(self) -> dict[str, int] | None:
        """Return the steps of each role for a checkpoint; None after one that had none."""
        return dict(self._steps) if self._known else None

    def load_state(self, state: Mapping[str, int] | None) -> None:
        """Load a saved state.

        After None, of a checkpoint of 0.1.0, the next update of a role is taken as right.
        """
        self._steps, self._known = dict(state or {}), state is not None

    def count(self, step: int, role: TrainRole, report: UpdateReport) -> None:
        """Count the optimizer steps of an update.

        Raises:
            AlarmError: the engine had taken another number before it: an update is missing, or was made twice.
        """
        expected = self._steps.get(role, 0 if self._known else report.steps_before)
        if report.steps_before != expected:
            raise AlarmError(
                f"step {step + 1}: the {role} had taken {report.steps_before} optimizer steps before it, expected {expected}"
            )
        self._steps[role] = expected + report.optimizer_steps

    def _check_epochs(self, step: int, role: TrainRole, epochs: int, parts: Sequence[TrainedRows], facts: BatchFacts) -> None:
        """Check that each epoch has every row with tokens to train on, once."""
        per_epoch = max(math.ceil(facts.learnable.sum() / self._config.mini_batch_size), 1)
        rows: dict[int, list[int]] = {}
        for part in parts:
            rows.setdefault(part.mini_batch // per_epoch, []).extend(part.rows)
        for epoch in sorted({*range(epochs), *rows}):
            times = np.bincount(np.array(rows.get(epoch, []), np.int64), minlength=len(facts.keys))
            expected = facts.learnable.astype(np.int64) * (epoch < epochs)
            for row in np.flatnonzero(times != expected)[:1]:
                found = f"is in {times[row]} optimizer steps of the {role} in epoch {epoch + 1}, expected {expected[row]}"
                raise fault(step, facts.keys[row], found)

    def _check_mini_batch(self, place: "_Place", parts: Sequence[TrainedRows], facts: BatchFacts) -> None:
        """Check rows, denominators and losses of one mini-batch, over all ranks."""
        rows, size = np.array([row for part in parts for row in part.rows], np.int64), self._config.mini_batch_size
        if len(rows) > size:
            raise place.fault(facts.keys[rows[-1]], f"is one of {len(rows)} samples of it, expected at most {size}")
        means = self._config.algorithm.parity.mini_batch_means
        whole = {} if means else {name: facts.count(name, rows) for name in parts[0].denominators}
        for part in parts:
            mine = np.array(part.rows, np.int64)
            for row in mine[part.fingerprints != facts.fingerprints[mine]][:1]:
                raise place.fault(facts.keys[row], "was trained with other tokens, masks or advantages than its own")
            own = {name: max(facts.count(name, mine), 1) * len(parts) for name in part.denominators} if means else whole
            for name, value in part.denominators.items():
                if value != own[name]:
                    raise place.fault(facts.keys[mine[0]], f"has a loss divided by {value:g} ({name}), expected {own[name]}")
            _check_loss(place, part, own, facts.keys[mine[0]])


@dataclass(frozen=True, slots=True)
class _Place:
    """An optimizer step of an update."""

    step: int
    role: str
    number: int

    def fault(self, key: SampleKey, what: str) -> AlarmError:
        """Return the error of a sample in this optimizer step."""
        return fault(self.step, key, f"in optimizer step {self.number} of the {self.role} {what}")


def _check_loss(place: _Place, part: TrainedRows, expected: Mapping[str, float], key: SampleKey) -> None:
    """Compare a loss with its summands over the expected denominators.

    A non-finite one is reported elsewhere.
    """
    summands = [value / expected[name] for name, value in part.sums.items()]
    allowed = LOSS_TOLERANCE * sum(size / expected[name] for name, size in part.sizes.items()) + 1e-12
    if math.isfinite(part.loss) and math.isfinite(allowed) and abs(part.loss - sum(summands)) > allowed:
        raise place.fault(key, f"has a loss of {part.loss:g}, expected {sum(summands):g}")


def _shares(step: int, role: TrainRole, reports: Sequence[UpdateReport], facts: BatchFacts) -> list[TrainedRows]:
    """Return the micro-batches of all shares by mini-batch.

    Ranks that share rows must report the same.
    """
    shares: dict[int, UpdateReport] = {}
    for report in reports:
        other = shares.setdefault(report.data_rank, report)
        mine, theirs = ({row for part in one.trained for row in part.rows} for one in (report, other))
        for row in sorted(mine ^ theirs)[:1]:
            raise fault(step, facts.keys[row], f"is computed by some of the {role} ranks that share it, expected all")
    return sorted((part for report in shares.values() for part in report.trained), key=lambda part: part.mini_batch)
