"""Optimizer steps of an update on one rank.

All ranks make the same decisions (shares, denominators, early stop, ratio guard), because they depend only on values that are
equal on every rank: the batch, the plan, and statistics summed over all ranks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.algorithms.importance import moved_too_far, ratio_exploded
from rayrlhf.data.fingerprints import row_fingerprints
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import POLICY_KL, RATIO, LossComponent, Objective, responses_under, weighted_loss
from rayrlhf.engines.objectives.policy import divergence_beta
from rayrlhf.engines.objectives.supervised import teacher_signal
from rayrlhf.engines.train.backends.base import TrainBackend
from rayrlhf.engines.train.collate import CollatedBatch, collate
from rayrlhf.engines.train.ema import MovingAverage
from rayrlhf.engines.train.meter import UpdateMeter
from rayrlhf.engines.train.optimizers import learning_rate_factor
from rayrlhf.engines.train.plan import MicroBatch, TrainedRows, UpdatePlan, UpdateReport, split_mini_batch
from rayrlhf.engines.train.process_group import Grid
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import AlarmError
from rayrlhf.models.network_io import OutputName
from rayrlhf.models.router_load import load_balancing_loss

_LOAD: frozenset[OutputName] = frozenset({"load"})


class Updater:
    """Runs updates on a train backend and counts its optimizer steps.

    Attributes:
        optimizer_steps: steps taken since the run began; part of the saved state.
        average: moving average of the weights, if this rank keeps one; part of the saved state.
    """

    def __init__(
        self,
        backend: TrainBackend,
        spec: TrainEngineSpec,
        device: torch.device,
        grid: Grid,
        average: MovingAverage | None = None,
        *,
        shares_prefixes: bool = False,
        measures_load: bool = False,
    ) -> None:
        self.optimizer_steps = 0
        self.average = average
        self._skipped_in_a_row = 0
        self._nonfinite = ""
        self._backend = backend
        self._spec = spec
        self._device = device
        self._shares_prefixes, self._measures_load = shares_prefixes, measures_load
        self._grid, self._ranks = grid, torch.distributed.get_world_size()
        self._group = 1 if grid.row_split is None else grid.row_split.size

    def run(self, batch: TrainingBatch, plan: UpdatePlan, objective: Objective) -> UpdateReport:
        """See `TrainEngine.update`."""
        meter = UpdateMeter(self._device, self._group, self._grid.data_rank, self.optimizer_steps)
        for epoch in plan.epochs:
            meter.epochs += 1
            for rows in epoch:
                self._mini_batch(batch, rows, objective, meter)
            target = self._spec.train.early_stop_kl
            if target is not None and moved_too_far(meter.last(POLICY_KL), target):
                meter.stopped_early = True
                break
        return meter.report()

    def _mini_batch(self, batch: TrainingBatch, rows: Sequence[int], objective: Objective, meter: UpdateMeter) -> None:
        """Take one optimizer step, or one per micro-batch under `parity.no_accumulation`."""
        parity = self._spec.parity
        shares = split_mini_batch(
            rows,
            batch.lengths,
            self._grid.data_ranks,
            self._spec.train,
            parity,
            group_size=batch.group_size,
            packing=self._spec.packing,
            tokens=[sequence.token_ids for sequence in batch.sequences] if self._shares_prefixes else None,
        )
        micro_batches = shares[self._grid.data_rank]
        whole_step = _counts(batch, rows, objective)
        for mask in objective.masks:
            if whole_step[mask] == 0:
                raise ValueError(f"no token under {mask!r} in the {len(rows)} samples of an optimizer step")
        real = sum(bool(micro_batch.weight) for share in shares for micro_batch in share)
        meter.begin_step()
        for index, micro_batch in enumerate(micro_batches):
            last = parity.no_accumulation or index == len(micro_batches) - 1
            denominators = whole_step
            if parity.mini_batch_means:
                own = _counts(batch, micro_batch.rows, objective)
                denominators = {mask: max(count, 1.0) * real for mask, count in own.items()}
            share = sum(batch.lengths[row] for row in micro_batch.rows) / sum(batch.lengths[row] for row in rows)
            selected = batch.select(micro_batch.rows)
            self._micro_batch(selected, micro_batch, objective, denominators, meter, share=share, last=last)
            if last:
                self._step(meter, micro_batch.rows if parity.no_accumulation else rows)
                if parity.no_accumulation and index < len(micro_batches) - 1:
                    meter.begin_step()
        meter.mini_batches += 1

    def _micro_batch(
        self,
        batch: TrainingBatch,
        micro_batch: MicroBatch,
        objective: Objective,
        denominators: dict[str, float],
        meter: UpdateMeter,
        *,
        share: float,
        last: bool,
    ) -> None:
        with meter.clock("forward"):
            collated = self._collated(batch, objective, shared=micro_batch.shared)
            components, tables, load = self._forward(collated, batch, objective)
            loss = weighted_loss(components, denominators) * micro_batch.weight
        if micro_batch.weight:
            meter.trained.append(_trained(meter.mini_batches, micro_batch.rows, batch, components, denominators, loss))
        if load is not None:
            balance = load_balancing_loss(load, sum(collated.positions.lengths))
            loss = loss + self._spec.train.router_aux_loss_coefficient * share * micro_batch.weight * balance
            meter.add_load(load.detach() * micro_batch.weight, balance.detach(), share * micro_batch.weight)
        if micro_batch.weight:
            found = batch.cause or _nonfinite_number(tables, batch, objective, micro_batch.rows)
            if found:
                loss = loss * math.nan  # clipping can hide an inf
            if not loss.isfinite():
                found = found or f"in the loss of samples {', '.join(map(str, micro_batch.rows))}"
                self._nonfinite = self._nonfinite or found
            counts = _counts(batch, range(len(batch)), objective)
            meter.add(components, counts)
            if self._spec.parity.mini_batch_means and self._exploded(_means(components, counts)):
                loss = loss * 0.0
                meter.guarded_steps += 1
        real, (rows, width) = bool(micro_batch.weight), collated.input_ids.shape
        computed = rows * -(-width // self._group)
        meter.add_tokens(real * sum(batch.lengths), real * sum(collated.positions.lengths), computed)
        with meter.clock("backward"):
            self._backend.backward(loss, last=last)

    def _collated(self, batch: TrainingBatch, objective: Objective, *, shared: bool) -> CollatedBatch:
        targets = None
        if self._spec.targets_only:
            targets = np.logical_or.reduce([batch.arrays[mask] for mask in objective.masks])
        return collate(
            batch.sequences, batch.width, self._device, targets_mask=targets, packed=self._spec.packing, shared=shared
        )

    def _forward(
        self, collated: CollatedBatch, batch: TrainingBatch, objective: Objective
    ) -> tuple[list[LossComponent], dict[str, Tensor], Tensor | None]:
        """Return the loss, the outputs [B, T] that it reads, and the load of experts."""
        arrays = {name: torch.from_numpy(array).to(self._device) for name, array in batch.arrays.items()}
        teacher = None
        if "divergence" in objective.outputs:
            teacher = teacher_signal(arrays, collated.logprob_slots, divergence_beta(objective))
        outputs = objective.outputs | (_LOAD if self._measures_load else frozenset())
        output = self._backend.forward(collated.input_ids, collated.positions, outputs, objective.temperature, teacher)
        tables: dict[str, Tensor] = {}
        for name in objective.outputs:
            slots = collated.value_slots if name == "values" else collated.logprob_slots
            tables[name] = collated.table(getattr(output, name), slots)
        return objective.compute(tables, arrays), tables, output.load

    def _step(self, meter: UpdateMeter, rows: Sequence[int]) -> None:
        train, parity = self._spec.train, self._spec.parity
        meter.finish_step(across_ranks=self._ranks > 1)
        if not parity.mini_batch_means and self._exploded(meter.step_means):
            self._backend.zero_grad()
            meter.guarded_steps += 1
        # A loss of NaN need not have a gradient of NaN: a maximum passes the gradient of its other branch.
        finite = all(math.isfinite(mean) for name, mean in meter.step_means.items() if name.startswith("loss/"))
        clip = train.max_grad_norm
        if parity.clip_first_step_only and self.optimizer_steps > 0:
            clip = None
        learning_rate = self._spec.learning_rate * learning_rate_factor(
            train.schedule, self.optimizer_steps, self._spec.total_optimizer_steps
        )
        with meter.clock("optimizer"):
            norm = self._backend.step(learning_rate, clip) if finite else self._backend.discard()
        self.optimizer_steps += 1
        self._check_skipped(norm, meter, rows)
        if self.average is not None:
            self.average.step()
        meter.grad_norms.append(norm)
        meter.learning_rates.append(learning_rate)

    def _check_skipped(self, norm: float, meter: UpdateMeter, rows: Sequence[int]) -> None:
        """Count steps that the backend discarded.

        Raises:
            AlarmError: more than `train.max_nonfinite_steps` in a row.
        """
        if math.isfinite(norm):
            self._skipped_in_a_row, self._nonfinite = 0, ""
            return
        meter.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self._spec.train.max_nonfinite_steps:
            found = [""] * self._ranks
            torch.distributed.all_gather_object(found, self._nonfinite)
            first = next(filter(None, found), f"in the backward pass of samples {', '.join(map(str, rows))}")
            raise AlarmError(
                f"{self._spec.role}: gradient with inf or NaN in {self._skipped_in_a_row} optimizer steps in a row, the last "
                f"one is step {self.optimizer_steps}; first non-finite value: {first}. No weight was changed by them"
            )

    def _exploded(self, means: dict[str, float]) -> bool:
        guard = self._spec.train.ratio_guard
        return guard is not None and RATIO in means and ratio_exploded(means[RATIO], guard)


def _trained(
    mini_batch: int,
    rows: tuple[int, ...],
    batch: TrainingBatch,
    components: Sequence[LossComponent],
    denominators: Mapping[str, float],
    loss: Tensor,
) -> TrainedRows:
    """Describe a micro-batch from what its forward pass read; `batch` has its rows alone."""
    sums = [component.coefficient * component.token_loss.loss.detach().sum() for component in components]
    total, *found = torch.stack([loss.detach(), *sums]).tolist()
    by_count: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for component, value in zip(components, found, strict=True):
        by_count[component.denominator] = by_count.get(component.denominator, 0.0) + value
        sizes[component.denominator] = sizes.get(component.denominator, 0.0) + abs(value)
    used = {name: denominators[name] for name in by_count}
    return TrainedRows(mini_batch, rows, row_fingerprints(batch, range(len(batch))), used, by_count, sizes, total)


def _counts(batch: TrainingBatch, rows: Sequence[int], objective: Objective) -> dict[str, float]:
    """Count tokens and responses under each of the objective's masks (see `LossComponent.denominator`)."""
    counts = {}
    for mask in objective.masks:
        positions = batch.arrays[mask][list(rows)].reshape(len(rows), -1)
        counts[mask] = float(positions.sum())
        counts[responses_under(mask)] = float(positions.any(1).sum())
    return counts


def _nonfinite_number(outputs: Mapping[str, Tensor], batch: TrainingBatch, objective: Objective, rows: Sequence[int]) -> str:
    """Name sample, token and origin of the first non-finite number of a loss.

    The text is empty if all are finite. A teacher's arrays may have -inf, the log-prob of no remainder, so they count only
    where an output is not finite.
    """
    masks = _masks(batch, objective)
    every, some = np.logical_and.reduce(masks), np.logical_or.reduce(masks)
    floats = {name: array for name, array in batch.arrays.items() if array.dtype == np.float32}
    # An array may be undefined under the mask of another one.
    found = _first_nonfinite({name: array for name, array in floats.items() if array.ndim == 2}, every, rows)
    if not found and not all(bool(table.isfinite().all()) for table in outputs.values()):
        computed = {f"{name} of the network": table.detach().float().cpu().numpy() for name, table in outputs.items()}
        found = _first_nonfinite(floats, some, rows) or _first_nonfinite(computed, some, rows)
    return found


def _masks(batch: TrainingBatch, objective: Objective) -> list[NDArray[np.bool_]]:
    """Return the masks, with both rows of a pair where one is masked in."""
    size = batch.group_size
    masks = [batch.arrays[name].astype(np.bool_) for name in objective.masks]
    return [mask.reshape(-1, size, mask.shape[1]).any(1).repeat(size, 0) for mask in masks]


def _first_nonfinite(tables: Mapping[str, NDArray[Any]], under: NDArray[np.bool_], rows: Sequence[int]) -> str:
    bad = {name: ~np.isfinite(table).reshape(*table.shape[:2], -1).all(2) & under for name, table in tables.items()}
    for row, token in np.argwhere(np.logical_or.reduce([np.zeros_like(under), *bad.values()])):
        return f"sample {rows[row]}, token {token}, {', '.join(name for name in bad if bad[name][row, token])}"
    return ""


def _means(components: Sequence[LossComponent], counts: dict[str, float]) -> dict[str, float]:
    return {
        name: float(total) / max(counts[component.mask], 1.0)
        for component in components
        for name, total in component.token_loss.sums().items()
    }
