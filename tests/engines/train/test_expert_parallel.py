"""Ranks that share experts take the steps of one process, on samples of their own; run in processes, as actors would.

The default matrix has two ranks. The wider one has groups within data parallelism, more ranks than two, bfloat16.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rayrlhf.engines.train.process_group import ProcessGroupSpec, join, make_grid
from tests.engines.train.ranks import LIMIT
from tests.engines.train.test_tensor_parallel import ALL, Cell, check, run_cells, run_matrix
from tests.engines.training import leave_at_once

GRADIENT = 6e-7
"""Largest difference of any gradient, relative to the largest one; found were 1.8e-7 to 4.9e-7."""
TWO = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def cell(family: str, stage: int, **changes: object) -> Cell:
    """One or two micro-batches a rank, and a filler."""
    usual = {"changes": TWO, "tokens": 16, "key": "expert_parallel", "bound": GRADIENT}
    return Cell(family, stage, **{**usual, **changes})  # type: ignore[arg-type]


CELLS = (
    cell("qwen3_moe", 0, packing=False, router_loss=0.1),
    cell("mixtral", 1, lora=ALL),  # with checkpointing
    cell("mixtral", 2, heads=("value",), packing=False),
    cell("qwen3_moe", 3, packing=False),
)
WIDE = (
    *(cell(family, stage) for family in ("qwen3_moe", "mixtral", "qwen2_moe") for stage in range(4)),
    *(cell("qwen3_moe", stage, lora=ALL) for stage in range(4)),
    cell("olmoe", 1, heads=("lm",)),
    cell("qwen3_moe", 1, offload=True),
    cell("qwen3_moe", 1, dtype="bfloat16"),
)


def main() -> None:
    rank, ranks, port, size, folder, names = sys.argv[1:]
    torch.set_num_threads(1)
    join(ProcessGroupSpec(int(rank), int(ranks), "127.0.0.1", int(port), timeout_seconds=300))
    run_cells([cell for cell in (*CELLS, *WIDE) if cell.name in json.loads(names)], Path(folder), int(size), rank)
    if int(ranks) == 2:
        torch.save(idle_rank(), Path(folder) / f"idle-{rank}.pt")
    leave_at_once()


def idle_rank() -> tuple[float, float]:
    """Differences of a layer's output and gradients if all tokens choose experts of rank 0, and this rank's gradient."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=4))
    layer.config._experts_implementation = "eager"
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    shared, split = copy.deepcopy(layer), make_grid(1, 1, 2).weight_split
    split.cut(nn.ModuleList([shared]))
    torch.manual_seed(1 + split.rank)
    tokens, chosen = torch.randn(5 + split.rank, 16), torch.randint(0, 2, (5 + split.rank, 2))
    found = []
    for experts in (layer, shared):
        states, weights = tokens.clone().requires_grad_(), torch.ones(chosen.shape, requires_grad=True)
        output = experts(states, chosen, weights)
        output.square().sum().backward()
        found.append([output.detach(), states.grad, weights.grad])
    for whole, own in zip(layer.parameters(), shared.parameters(), strict=True):
        torch.distributed.all_reduce(whole.grad)
        found[0].append(whole.grad)
        found[1].append(split.whole(own, own.grad))
    apart = max(float((one - other).abs().max() / one.abs().max()) for one, other in zip(*found, strict=True))
    return apart, max(float(own.grad.abs().max()) for own in shared.parameters())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_matrix(folder, CELLS, 2, 2, __name__)
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_ranks_that_share_experts_take_the_steps_of_one(two_ranks: Path, cell: Cell) -> None:
    check(two_ranks, cell, 2, 2)


def test_a_rank_without_tokens_for_its_experts_takes_part(two_ranks: Path) -> None:
    (apart, gradient), (apart_idle, idle) = (torch.load(two_ranks / f"idle-{rank}.pt") for rank in range(2))
    assert max(apart, apart_idle) < 1e-6
    assert (gradient > 0, idle) == (True, 0.0)


@pytest.mark.nightly
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("ranks", "size"), [(4, 2), (4, 4)])
def test_more_ranks_that_share_experts_take_the_steps_of_one(tmp_path: Path, ranks: int, size: int, stage: int) -> None:
    """Two groups of two, with fillers where a rank has fewer micro-batches, and one of four."""
    cells = tuple(cell for cell in WIDE if cell.stage == stage)
    run_matrix(tmp_path, cells, ranks, size, __name__)
    for cell in cells:
        check(tmp_path, cell, ranks, size)
