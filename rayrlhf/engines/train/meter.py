"""Statistics of an update: sums over tokens, gradient norms and times.

Means are formed once, over all ranks.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from rayrlhf.engines.objectives.base import RATIO, LossComponent
from rayrlhf.engines.train.plan import TrainedRows, UpdateReport
from rayrlhf.models.router_load import load_metrics
from rayrlhf.observe.metric_names import ROUTER_LOSS


class UpdateMeter:
    """Collects the figures of an `UpdateReport`. A step is one optimizer step.

    Args:
        group: ranks that share each row.
        data_rank: number of this rank's share of the samples.
        steps_before: optimizer steps taken before the update.

    Attributes:
        mini_batches: begun so far.
        trained: micro-batches computed so far, without fillers.
    """

    def __init__(self, device: torch.device, group: int = 1, data_rank: int = 0, steps_before: int = 0) -> None:
        self.epochs = 0
        self.stopped_early = False
        self.guarded_steps = self.skipped_steps = 0
        self.grad_norms: list[float] = []
        self.learning_rates: list[float] = []
        self.step_means: dict[str, float] = {}
        self.mini_batches = 0
        self.trained: list[TrainedRows] = []
        self._device, self._group = device, group
        self._data_rank, self._steps_before = data_rank, steps_before
        self._steps: list[dict[str, tuple[float, float]]] = []
        self._sums: dict[str, tuple[float, float]] = {}
        self._step_metrics: list[dict[str, float]] = []
        self._seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self._tokens = self._distinct = self._computed = 0
        self._load = self._loads = torch.zeros((), dtype=torch.float64, device=device)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the block's duration to a phase.

        It waits for the GPU, so that asynchronous work counts in its own phase.
        """
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[phase] += time.perf_counter() - start

    def begin_step(self) -> None:
        """Start an optimizer step."""
        self._sums = {}
        self._load = torch.zeros_like(self._load)

    def add(self, components: Sequence[LossComponent], counts: Mapping[str, float]) -> None:
        """Add a micro-batch's statistics; `counts` are its tokens under each mask."""
        for component in components:
            for name, total in component.token_loss.sums().items():
                before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before[0] + float(total), before[1] + counts[component.mask])

    def add_load(self, load: torch.Tensor, loss: torch.Tensor, share: float) -> None:
        """Add the load of a micro-batch's experts.

        Every rank does, also for fillers, with zeros.

        Args:
            load: see `RouterLoad.total`.
            loss: its load-balancing loss.
            share: of the step's tokens.
        """
        self._load = self._load + load.double()
        before = self._sums.get(ROUTER_LOSS, (0.0, 0.0))
        self._sums[ROUTER_LOSS] = (before[0] + float(loss) * share, before[1] + share)

    def add_tokens(self, tokens: int, distinct: int, computed: int) -> None:
        """Count the tokens of a forward and backward; those of a filler are padding.

        Args:
            tokens: of all sequences.
            distinct: without those that shared prefixes saved.
            computed: with padding, by this rank.
        """
        self._tokens += tokens
        self._distinct += distinct
        self._computed += computed

    def finish_step(self, *, across_ranks: bool) -> None:
        """Sum the step's statistics over the ranks and form its means in `step_means`."""
        if across_ranks:
            self._sums = _summed_over_ranks(self._sums, self._device)
            if self._load.ndim:
                torch.distributed.all_reduce(self._load)
        self._loads = self._loads + self._load
        self._steps.append(self._sums)
        self.step_means = {name: total / count for name, (total, count) in self._sums.items()}
        self._step_metrics.append(self.step_means)

    def last(self, name: str) -> float:
        """Return the last step's mean of a statistic, or 0."""
        return self.step_means.get(name, 0.0)

    def report(self) -> UpdateReport:
        """Build the report."""
        metrics = {}
        for name in self._steps[0] if self._steps else ():
            metrics[name] = sum(step[name][0] for step in self._steps) / sum(step[name][1] for step in self._steps)
        if RATIO in metrics:
            ratios = torch.tensor([step[RATIO] for step in self._step_metrics], dtype=torch.float64)
            metrics["val/ratio_var"] = float(ratios.var()) if len(ratios) > 1 else 0.0
        if self._loads.ndim:
            metrics |= load_metrics(self._loads)
        return UpdateReport(
            metrics=metrics,
            grad_norms=self.grad_norms,
            learning_rates=self.learning_rates,
            optimizer_steps=len(self.grad_norms),
            epochs=self.epochs,
            stopped_early=self.stopped_early,
            guarded_steps=self.guarded_steps,
            skipped_steps=self.skipped_steps,
            tokens=self._tokens,
            computed=self._computed,
            shared_fraction=1.0 - self._distinct / self._tokens if self._tokens else 0.0,
            padding_share=1.0 - self._distinct / (self._computed * self._group) if self._computed else 0.0,
            seconds=self._seconds,
            step_metrics=self._step_metrics,
            trained=self.trained,
            data_rank=self._data_rank,
            steps_before=self._steps_before,
        )


def _summed_over_ranks(sums: Mapping[str, tuple[float, float]], device: torch.device) -> dict[str, tuple[float, float]]:
    """Sum over the ranks.

    A rank with fillers only has no names, so all ranks use the union of names.
    """
    names: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(names, sorted(sums))
    union = sorted(set().union(*names))
    flat = torch.tensor([sums.get(name, (0.0, 0.0)) for name in union], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(flat)
    return {name: (float(total), float(count)) for name, (total, count) in zip(union, flat.tolist(), strict=True)}
