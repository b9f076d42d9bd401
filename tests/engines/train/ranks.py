"""What the tests of ranks that share rows or weights have in common: experience, a loss, processes, comparisons."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from tests.engines.training import free_port, join_alone, random_sequences

VOCABULARY = 264
SEQUENCES = random_sequences(7, vocabulary=VOCABULARY)
PLAN = UpdatePlan([[[3, 1, 6, 5], [0, 2, 4]]])
READ = {"lm": ("logprobs", "entropy"), "value": ("values",)}


@dataclass(frozen=True)
class PlainObjective:
    """Terms that are linear in log-probs and entropy and square in values, so that no rounding is amplified."""

    outputs: frozenset[Any]
    masks: ClassVar[tuple[str, ...]] = ("action_mask", "value_mask")
    temperature: float = 0.9

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        def component(mask: str, loss: Tensor) -> LossComponent:
            kept = loss * arrays[mask]
            return LossComponent(mask, 1.0, TokenLoss(kept, {f"loss/{mask}": kept.detach()}))

        parts = []
        if "logprobs" in outputs:
            advantages = torch.where(arrays["action_mask"], arrays["advantages"], 0.0)
            parts.append(component("action_mask", -outputs["logprobs"] * advantages - 0.01 * outputs["entropy"]))
        if "values" in outputs:
            returns = torch.where(arrays["value_mask"], arrays["returns"], 0.0)
            parts.append(component("value_mask", 0.5 * (outputs["values"] - returns) ** 2))
        return parts


def outputs_of(heads: Iterable[str]) -> frozenset[Any]:
    return frozenset(name for head in heads for name in READ[head])


def gradients(engine: TrainEngine) -> dict[str, Tensor]:
    """Gradients of this rank's parameters as the optimizer is about to see them."""
    from deepspeed.utils import safe_get_full_grad

    stage = engine._backend._stage
    named = [(name, one) for name, one in engine._network.named_parameters() if one.requires_grad]
    found = {name: one.grad if stage == 0 else safe_get_full_grad(one) for name, one in named}
    return {name: gradient.detach().float().clone() for name, gradient in found.items() if gradient is not None}


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest entry."""
    assert set(found) == set(wanted)
    largest = max(float(one.abs().max()) for one in wanted.values())
    return max(float((found[name] - one).abs().max()) for name, one in wanted.items()) / largest


def run_processes(module: str, ranks: int, arguments: list[str], alone: Callable[[], None]) -> None:
    """Run `main` of a module as ranks of a world, and `alone` in this process meanwhile."""
    code, port = f"from {module} import main; main()", free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(ranks), str(port), *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    join_alone()
    alone()
    errors = [process.communicate(timeout=500)[1].decode() for process in processes]
    failed = [error[-3000:] for process, error in zip(processes, errors, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
