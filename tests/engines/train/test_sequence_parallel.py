"""Ranks that share rows take the steps of one process; run in processes of their own, as actors would.

The default matrix has two ranks. The wider one has groups within data parallelism, all ZeRO stages, bfloat16 and experts.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.policy_loss import GSPOLossSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.train.collate import collate
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join, make_grid
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from rayrlhf.models import load_check, packed_attention
from rayrlhf.models.network import Network, build_network
from rayrlhf.models.network_io import Positions, TeacherSignal
from tests.engines.train.ranks import (
    LIMIT,
    PLAN,
    SEQUENCES,
    VOCABULARY,
    PlainObjective,
    gradients,
    outputs_of,
    relative,
    run_processes,
)
from tests.engines.training import leave_at_once, random_batch, weights_of
from tests.models.families import write_family

TIMEOUT = 300
segment_attention = packed_attention._segment_attention
GRADIENT = 5e-7
"""Largest difference of any gradient, relative to the largest one; found were 1.1e-7 to 3.5e-7."""


@dataclass(frozen=True)
class Cell:
    """One configuration of the matrix."""

    family: str
    stage: int = 0
    packing: bool = True
    heads: tuple[str, ...] = ("lm", "value")
    lora: bool = False
    dtype: str = "float32"
    objective: str = "plain"
    changes: Mapping[str, Any] = field(default_factory=lambda: TWO)
    router_loss: float = 0.0

    @property
    def name(self) -> str:
        heads = self.changes.get("num_attention_heads", 2)
        rows = "packed" if self.packing else "padded"
        parts = (self.family, f"{heads}heads", f"zero{self.stage}", rows, *self.heads, self.dtype, self.objective)
        return "-".join(parts) + ("-lora" if self.lora else "")


TWO = {"num_hidden_layers": 2}
FOUR = {**TWO, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
THREE = {**TWO, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
CELLS = (
    Cell("qwen3", 0, changes=FOUR),
    Cell("qwen3", 3, packing=False, changes=FOUR),
    Cell("llama", 3, lora=True),  # two heads and one key head, which both ranks repeat; with checkpointing
    Cell("llama", 0, packing=False, objective="gspo", heads=("lm",)),
    Cell("qwen2", 0, changes=THREE),  # keys are gathered
    Cell("qwen2", 3, packing=False, heads=("value",)),
    Cell("mixtral", 0, heads=("lm",), changes=FOUR, router_loss=0.1),
)
WIDE = (
    *(Cell("qwen3", stage, packing, changes=FOUR) for stage in range(4) for packing in (True, False)),
    *(Cell("qwen2", stage, changes=THREE) for stage in (1, 3)),
    *(Cell("llama", stage, lora=True) for stage in (0, 1, 2)),
    *(Cell(family, stage, changes=FOUR) for family in ("mixtral", "qwen3_moe") for stage in (0, 3)),
    Cell("qwen3", 1, heads=("value",), packing=False, changes=FOUR),
    Cell("qwen3", 3, dtype="bfloat16", changes=FOUR),
    Cell("qwen2", 0, dtype="bfloat16", changes=THREE),
)


def engine_of(cell: Cell, folder: Path, sequence_parallel: int) -> TrainEngine:
    lora = LoraSection(rank=4, target_modules=["q_proj", "v_proj", "o_proj"]) if cell.lora else None
    model = ModelSection(path=str(folder), dtype=cell.dtype, lora=lora, gradient_checkpointing=cell.lora)
    train = TrainSection(
        zero_stage=cell.stage, micro_batch_tokens=40, optimizer=OptimizerSection(name="sgd"), max_grad_norm=None,
        router_aux_loss_coefficient=cell.router_loss,
    )  # fmt: skip
    spec = TrainEngineSpec(
        model, frozenset(cell.heads), train, 0.05, head_init="normal", parity=ParitySection(), packing=cell.packing,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    return TrainEngine(spec)


def run_cell(cell: Cell, folder: Path, sequence_parallel: int) -> dict[str, Any]:
    engine = engine_of(cell, folder, sequence_parallel)
    outputs = outputs_of(cell.heads)
    scores = engine.score(SEQUENCES, outputs, temperature=0.9)
    found: dict[str, Any] = {
        "scores": {name: np.concatenate([getattr(one, name) for one in scores]) for name in outputs}, "gradients": []
    }  # fmt: skip
    step = engine._backend.step

    def watched(learning_rate: float, max_norm: float | None) -> float:
        found["gradients"].append(gradients(engine))
        return step(learning_rate, max_norm)

    engine._backend.step = watched  # type: ignore[method-assign]
    gspo = GSPOLossSection(name="gspo", clip_low=0.9, clip_high=9.0)
    objective = PlainObjective(outputs) if cell.objective == "plain" else PolicyObjective(gspo)
    report = engine.update(random_batch(SEQUENCES), PLAN, objective)
    engine._backend.step = step  # type: ignore[method-assign]
    found |= {"metrics": report.metrics, "norms": report.grad_norms, "weights": weights_of(engine), "split": [
        engine.grid.row_split is not None, engine._spec.packing
    ], "computed": report.computed, "padding": report.padding_share, "check": engine.load_check}  # fmt: skip
    assert not engine.shares_prefixes or sequence_parallel == 1
    if cell.stage == 3 and cell.family == "qwen2":
        state = folder.parent / f"state-{cell.name}-{torch.distributed.get_world_size()}"
        engine.save_state(state)
        resumed = engine_of(cell, folder, sequence_parallel)
        resumed.load_state(state)
        found["resumed"] = [one.update(random_batch(SEQUENCES), PLAN, objective).metrics for one in (engine, resumed)]
        spoiled = random_batch(SEQUENCES)
        for name in ("advantages", "returns"):
            spoiled.arrays[name][:, 0] = np.nan
        found["skipped"] = engine.update(spoiled, PLAN, objective).skipped_steps
    return found


def saved_bytes(network: Network, length: int) -> int:
    """Bytes that autograd keeps of a forward pass over one row, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(length)[None] % VOCABULARY
    empty = torch.zeros(0, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(tokens, Positions(torch.tensor([3]), torch.tensor([4]), empty, [length]), frozenset({"logprobs"}))
    assert output.logprobs.requires_grad
    return sum(kept.values())


def doubled(module: Any, query: Tensor, *others: Any, **rest: Any) -> Any:
    """Attention within segments with a fault that whole rows and columns have in common."""
    return segment_attention(module, 2 * query, *others, **rest)


REFUSED = (
    (packed_attention, "_segment_attention", doubled, (0, 1)),
    (load_check, "_equal", lambda *_: False, (1,)),  # one rank alone; the other must not wait for it
)


def network_parts(folder: Path, size: int) -> dict[str, Any]:
    """Memory, distillation, noise and a refusal, on networks without an engine."""
    grid = make_grid(size)
    network = build_network(ModelSection(path=str(folder / "qwen3-4"), dtype="float32"), frozenset({"lm"}), "zero", 0)
    network.accept_packed_rows()
    if grid.row_split is not None:
        network.split_rows(grid.row_split, "qwen3")
    found: dict[str, Any] = {"bytes": saved_bytes(network, 240)}
    batch = collate(SEQUENCES, 20, torch.device("cpu"), packed=True)
    generator = torch.Generator().manual_seed(3)
    network.teacher_layer = torch.randn(VOCABULARY, 24, generator=generator), None
    teacher = TeacherSignal(hidden=torch.randn(len(batch.positions.predictors), 24, generator=generator), beta=0.5)
    with torch.no_grad():
        output = network(batch.input_ids, batch.positions, frozenset({"divergence", "hidden"}), 1.0, teacher)
    found |= {"divergence": output.divergence, "hidden": output.hidden}
    network.noise_alpha = 5.0
    embedded, noisy = [], []
    network.trunk.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    network.trunk.layers[0].register_forward_pre_hook(lambda _, inputs: noisy.append(inputs[0]))
    network(batch.input_ids, batch.positions, frozenset({"logprobs"}))
    noise = (noisy[-1] - embedded[-1])[0].abs().amax(-1)
    lengths = torch.tensor([length for length in batch.positions.lengths for _ in range(length)] + [1])
    bounds = 5.0 / (lengths * 64).sqrt()
    found["noise"] = noise / (bounds if grid.row_split is None else grid.row_split.own(bounds[None, :-1])[0])[: len(noise)]
    if grid.row_split is not None:
        windowed = build_network(ModelSection(path=str(folder / "mistral"), dtype="float32"), frozenset({"lm"}), "zero", 0)
        with pytest.raises(UserError, match=r"sequence_parallel 2: a mistral model .* computes something else"):
            windowed.split_rows(grid.row_split, "mistral")
        found["timeout"] = grid.row_split.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for module, name, fault, ranks in REFUSED:
            faulty = build_network(ModelSection(path=str(folder / "qwen3-4"), dtype="float32"), frozenset({"lm"}), "zero", 0)
            with pytest.MonkeyPatch.context() as patch:
                if grid.row_split.rank in ranks:
                    patch.setattr(module, name, fault)
                with pytest.raises(UserError, match="computes something else"):
                    faulty.split_rows(grid.row_split, "qwen3")
    return found


def model_folder(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.family}-{cell.changes.get('num_attention_heads', 2)}"


def main() -> None:
    rank, ranks, port, size, folder, names = sys.argv[1:]
    torch.set_num_threads(1)
    join(ProcessGroupSpec(int(rank), int(ranks), "127.0.0.1", int(port), timeout_seconds=TIMEOUT))
    for cell in (*CELLS, *WIDE):
        if cell.name in json.loads(names):
            result = run_cell(cell, model_folder(Path(folder), cell), int(size))
            torch.save(result, Path(folder) / f"{cell.name}-{rank}.pt")
    if (Path(folder) / "mistral").exists():
        torch.save(network_parts(Path(folder), int(size)), Path(folder) / f"parts-{rank}.pt")
    leave_at_once()


def run_matrix(folder: Path, cells: tuple[Cell, ...], ranks: int, size: int) -> None:
    """Leave the results of `ranks` processes and, as rank `alone`, of this one in the folder."""
    for cell in cells:
        if not model_folder(folder, cell).exists():
            write_family(cell.family, model_folder(folder, cell), **cell.changes)

    def alone() -> None:
        for cell in cells:
            single = replace(cell, stage=0)
            if not (folder / f"{single.name}-alone.pt").exists():
                torch.save(run_cell(single, model_folder(folder, cell), 1), folder / f"{single.name}-alone.pt")

    run_processes(__name__, ranks, [str(size), str(folder), json.dumps([cell.name for cell in cells])], alone)


def check(folder: Path, cell: Cell, ranks: int) -> None:
    alone = torch.load(folder / f"{replace(cell, stage=0).name}-alone.pt", weights_only=False)
    every = [torch.load(folder / f"{cell.name}-{rank}.pt", weights_only=False) for rank in range(ranks)]
    bound = GRADIENT * (3 if cell.objective == "gspo" else 1)
    for found in every:
        assert found["split"] == [True, cell.packing]
        assert found["check"].endswith("prefixes are not shared: ranks share rows (sequence_parallel)")
        if ranks == 2:
            assert alone["computed"] <= 2 * found["computed"] <= alone["computed"] + 2 * len(SEQUENCES)
            assert found["padding"] == pytest.approx(alone["padding"], abs=0.05)
        for name, wanted in alone["scores"].items():
            np.testing.assert_allclose(found["scores"][name], wanted, rtol=0, atol=1e-5, err_msg=name)
        print(cell.name, [f"{relative(*both):.1e}" for both in zip(found["gradients"], alone["gradients"], strict=True)])
        assert relative(found["gradients"][0], alone["gradients"][0]) < bound
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6)
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-6)
        assert relative(found["weights"], alone["weights"]) < 1e-6
        assert all(torch.equal(tensor, every[0]["weights"][name]) for name, tensor in found["weights"].items())
        if "resumed" in found:
            assert found["resumed"][0] == found["resumed"][1]
            assert found["skipped"] == 2


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_family("mistral", folder / "mistral")
    run_matrix(folder, CELLS, 2, 2)
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_ranks_that_share_rows_take_the_steps_of_one(two_ranks: Path, cell: Cell) -> None:
    lengths = [len(sequence.token_ids) for sequence in SEQUENCES]
    assert any(length % 2 for length in lengths)
    check(two_ranks, cell, 2)


def test_ranks_that_share_rows_keep_their_part_of_the_activations_and_read_what_one_reads(two_ranks: Path) -> None:
    alone = network_parts(two_ranks, 1)
    for found in (torch.load(two_ranks / f"parts-{rank}.pt", weights_only=False) for rank in range(2)):
        assert found["timeout"] == TIMEOUT
        assert found["bytes"] == pytest.approx(alone["bytes"] / 2, rel=0.08)
        torch.testing.assert_close(found["divergence"], alone["divergence"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["hidden"], alone["hidden"], rtol=0, atol=1e-5)
        real = found["noise"][found["noise"].isfinite()]
        assert len(real) >= sum(len(sequence.token_ids) for sequence in SEQUENCES) // 2
        assert 0.8 < float(real.max()) <= 1.00001


@pytest.mark.nightly
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize(("ranks", "size"), [(4, 2), (3, 3)])
def test_groups_within_data_parallelism_take_the_steps_of_one(tmp_path: Path, ranks: int, size: int) -> None:
    """Two groups of two, with fillers where a group has fewer micro-batches, and three ranks that divide no heads of four."""
    run_matrix(tmp_path, WIDE, ranks, size)
    for cell in WIDE:
        check(tmp_path, cell, ranks)
