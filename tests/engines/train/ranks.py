"""What the tests of ranks that share rows or weights have in common: experience, a loss, processes, comparisons."""

import gc
import importlib
import os
import subprocess
import sys
import traceback
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
LIMIT = 1800
"""Seconds of the wider matrices, which have four processes on two cores."""
PRELOADED = (
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "peft",
)
"""Libraries that an engine imports on first use, for seconds."""
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
    code = f"from {module} import main; from {__name__} import fork_ranks; fork_ranks(main, {ranks})"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ranks), str(free_port()), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    join_alone()
    alone()
    error = process.communicate(timeout=LIMIT)[1].decode()
    assert process.returncode == 0, error[-3000:]


def fork_ranks(main: Callable[[], None], ranks: int) -> None:
    """Run `main` as each rank in a fork of this process, whose libraries take longer to import than most tests run."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage for each engine at ZeRO-3: a second over all libraries
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            sys.argv.insert(1, str(rank))
            try:
                main()
            finally:  # it ends the process, unless it fails
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
