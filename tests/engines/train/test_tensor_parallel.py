"""Ranks that share weights take the steps of one process; run in processes of their own, as actors would.

The default matrix has two ranks. The wider one has groups within data parallelism, more ranks than two, bfloat16, offloading.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.engines.train.collate import collate
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join, make_grid
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from rayrlhf.models import load_check
from rayrlhf.models.load_check import split_weights
from rayrlhf.models.logprobs import VocabularyPart, logprobs_and_entropy
from rayrlhf.models.network import build_network
from rayrlhf.models.network_io import TeacherSignal
from rayrlhf.models.skeleton import skeleton
from rayrlhf.models.tensor_parallel import is_cut, whole_shape
from rayrlhf.observe.metric_names import ROUTER_LOSS
from rayrlhf.tools.launch.model_shape import cut_shape, shape_of
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

GRADIENT = 1e-6
"""Largest difference of any gradient, relative to the largest one; found were 2.9e-7 to 7.4e-7."""
ADAPTERS = 2e-6
"""The same for adapters of all layers with 4 heads; found were 1.2e-6 to 1.4e-6 at every ZeRO stage."""
TWO = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
FOUR = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
ALL = LoraSection(rank=4)


@dataclass(frozen=True)
class Cell:
    """One configuration of the matrix."""

    family: str
    stage: int = 0
    heads: tuple[str, ...] = ("lm", "value")
    packing: bool = True
    lora: LoraSection | None = None
    dtype: str = "float32"
    offload: bool = False
    changes: Mapping[str, Any] = field(default_factory=lambda: TWO)
    tokens: int = 40
    key: str = "tensor_parallel"
    bound: float = GRADIENT
    router_loss: float = 0.0

    @property
    def name(self) -> str:
        heads, lora = self.changes["num_attention_heads"], f"lora{len(self.lora.target_modules)}" if self.lora else "all"
        parts = (self.family, f"{heads}heads", f"zero{self.stage}", str(self.packing), *self.heads, lora, self.dtype)
        return "-".join(parts) + "-offload" * self.offload + "-router" * bool(self.router_loss)


CELLS = (
    Cell("qwen3", 0),
    Cell("llama", 1, lora=ALL),  # held in 16 bits under adapters, with checkpointing
    Cell("qwen2", 2, heads=("value",), packing=False),
    Cell("starcoder2", 0, heads=("lm",)),  # biases of layers that are cut by input features
    Cell("qwen3", 3),  # an embedding that is the output layer, and norms within heads
)
WIDE = (
    *(Cell(family, stage, changes=FOUR) for family in ("qwen3", "llama", "qwen2") for stage in range(4)),
    *(Cell("llama", stage, lora=ALL, changes=FOUR, bound=ADAPTERS) for stage in range(4)),
    Cell("qwen3", 1, lora=LoraSection(rank=4, target_modules=["o_proj", "down_proj", "q_proj"]), changes=FOUR),
    Cell("qwen3", 2, heads=("value",), packing=False, changes=FOUR),
    *(Cell("qwen3", stage, offload=True, changes=FOUR) for stage in (1, 3)),
    Cell("qwen3", 1, dtype="bfloat16", changes=FOUR),
    *(Cell("llama", stage, dtype="bfloat16", changes=FOUR) for stage in (0, 3)),
)


def engine_of(cell: Cell, folder: Path, size: int) -> TrainEngine:
    model = ModelSection(path=str(folder), dtype=cell.dtype, lora=cell.lora, gradient_checkpointing=cell.lora is not None)
    train = TrainSection(
        zero_stage=cell.stage, micro_batch_tokens=cell.tokens, optimizer=OptimizerSection(name="sgd"), max_grad_norm=0.5,
        offload_optimizer=cell.offload, router_aux_loss_coefficient=cell.router_loss,
        micro_batch_size=1 if cell.router_loss else None,
    )  # fmt: skip
    spec = TrainEngineSpec(
        model, frozenset(cell.heads), train, 0.05, head_init="normal", parity=ParitySection(), packing=cell.packing,
        **{cell.key: size},  # type: ignore[arg-type]
    )  # fmt: skip
    engine = TrainEngine(spec)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in engine._network.named_parameters():
        if ".lora_B." in name:  # zero at first
            whole = torch.randn(whole_shape(parameter), generator=generator) * 0.1
            own = whole if not is_cut(parameter) else whole.chunk(size)[engine.grid.weight_split.rank]
            safe_set(parameter, own)
    return engine


def safe_set(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a weight, and the optimizer's copy of it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters(parameter, modifier_rank=0):
        parameter.data.copy_(value)
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)


def raw(engine: TrainEngine) -> dict[str, tuple[bool, Tensor]]:
    """This rank's trained parameters, and whether each is cut."""
    trained = {name: one for name, one in engine._network.named_parameters() if one.requires_grad}
    with engine._backend.gathered(list(trained.values())):
        return {name: (is_cut(one), one.detach().clone()) for name, one in trained.items()}


def run_cell(cell: Cell, folder: Path, size: int, output: Path) -> dict[str, Any]:
    engine = engine_of(cell, folder, size)
    outputs = outputs_of(cell.heads)
    scores = engine.score(SEQUENCES, outputs, temperature=0.9)
    held = (getattr(one, "ds_tensor", one) for one in engine._network.model.parameters())
    found: dict[str, Any] = {
        "scores": {name: np.concatenate([getattr(one, name) for one in scores]) for name in outputs}, "gradients": [],
        "start": weights_of(engine), "held": sum(one.numel() for one in held),
        "shares": engine.shares_prefixes,
    }  # fmt: skip
    step, parameters = engine._backend.step, dict(engine._network.named_parameters())

    def watched(learning_rate: float, max_norm: float | None) -> float:
        own = gradients(engine)
        found["gradients"].append({name: engine._whole(parameters[name], one) for name, one in own.items()})
        return step(learning_rate, max_norm)

    engine._backend.step = watched  # type: ignore[method-assign]
    objective = PlainObjective(outputs)
    report = engine.update(random_batch(SEQUENCES), PLAN, objective)
    engine._backend.step = step  # type: ignore[method-assign]
    found |= {"metrics": report.metrics, "norms": report.grad_norms, "weights": weights_of(engine), "raw": raw(engine)}
    found |= {"checksums": engine.checksums(), "arrived": engine.update_arrived, "computed": report.computed}
    if cell.dtype == "float32":
        engine.export(output / "export")
    if cell.dtype == "float32" and size > 1:
        found |= resume(engine, cell, folder, output, objective)
        spoiled = random_batch(SEQUENCES)
        for name in ("advantages", "returns"):
            spoiled.arrays[name][:, 0] = np.nan
        found["skipped"] = engine.update(spoiled, PLAN, objective).skipped_steps
    return found


def resume(engine: TrainEngine, cell: Cell, folder: Path, output: Path, objective: PlainObjective) -> dict[str, Any]:
    """Continue from a saved state on the same grid, and try to on another one."""
    state = output / f"state-{torch.distributed.get_world_size()}"
    engine.save_state(state)
    size = engine.grid.weight_split.size
    resumed = engine_of(cell, folder, size)
    resumed.load_state(state)
    metrics = [one.update(random_batch(SEQUENCES), PLAN, objective).metrics for one in (engine, resumed)]
    apart = max(float((one[1] - other[1]).abs().max()) for one, other in zip(*map(values_of, (engine, resumed)), strict=True))
    with pytest.raises(UserError, match=f"another number of ranks; expected the same with {cell.key}"):
        resumed.load_state(state, resized=True)
    if cell.stage == 0:
        other = engine_of(cell, folder, 1)
        for resized in (False, True):
            with pytest.raises(UserError, match=f"is of tensor_parallel or expert_parallel {size}, this run has 1; expected"):
                other.load_state(state, resized=resized)
    return {"resumed": metrics, "apart": apart}


def values_of(engine: TrainEngine) -> list[tuple[bool, Tensor]]:
    return list(raw(engine).values())


def refused(folder: Path, size: int, fault: Callable[[pytest.MonkeyPatch], None] | None) -> str:
    """The message for a network that cannot be cut."""
    split = make_grid(1, size).weight_split
    network = build_network(ModelSection(path=str(folder), dtype="float32"), frozenset({"lm"}), "zero", 0)
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch)
        with pytest.raises(UserError) as caught:
            split_weights(network, split, "somewhere", torch.device("cpu"))
    return str(caught.value)


def unsummed(patch: pytest.MonkeyPatch) -> None:
    """The gradients of norms within heads miss the other ranks' part."""
    patch.setattr(nn.Parameter, "register_hook", lambda *_: None, raising=False)


def unequal(patch: pytest.MonkeyPatch) -> None:
    """One rank alone finds a difference; the other must not wait for it."""
    if torch.distributed.get_rank() == 1:
        patch.setattr(load_check, "_equal", lambda *_, **__: False)


def vocabulary(folder: Path, size: int) -> list[Tensor]:
    """Log-probs with bias and cap, a divergence, and all gradients, from weights that are whole or cut by rows."""
    split, generator = make_grid(1, size).weight_split, torch.Generator().manual_seed(3)
    hidden, weight, bias, targets = torch.randn(9, 16), torch.randn(24, 16), torch.randn(24), torch.arange(9) * 5 % 24
    own = slice(0, 24) if split is None else slice(split.rank * 12, split.rank * 12 + 12)
    part = None if split is None else VocabularyPart(split.group, own.start)
    inputs = [one.clone().requires_grad_() for one in (hidden, weight[own], bias[own])]
    logprobs, entropy = logprobs_and_entropy(*inputs, targets, temperature=0.7, cap=3.0, part=part)
    (logprobs.square() + 0.5 * entropy.square()).sum().backward()
    network = build_network(ModelSection(path=str(folder / "qwen3-2"), dtype="float32"), frozenset({"lm"}), "zero", 0)
    if split is not None:
        split_weights(network, split, "qwen3", torch.device("cpu"))
    head = network.model.get_output_embeddings().weight
    batch = collate(SEQUENCES, 20, torch.device("cpu"), packed=False)
    count = len(batch.positions.predictors)
    network.teacher_layer = torch.randn(VOCABULARY, 24, generator=generator), None
    teacher = TeacherSignal(hidden=torch.randn(count, 24, generator=generator), beta=0.5)
    apart = network(batch.input_ids, batch.positions, frozenset({"divergence"}), 1.0, teacher).divergence
    apart.sum().backward()
    found = [logprobs.detach(), entropy.detach(), inputs[0].grad, inputs[1].grad, inputs[2].grad, apart.detach(), head.grad]
    if split is not None:
        for place in (3, 4, 6):
            found[place] = split.whole(head, found[place])
    return found


def main() -> None:
    rank, ranks, port, size, folder, names = sys.argv[1:]
    torch.set_num_threads(1)
    join(ProcessGroupSpec(int(rank), int(ranks), "127.0.0.1", int(port), timeout_seconds=300))
    run_cells([cell for cell in (*CELLS, *WIDE) if cell.name in json.loads(names)], Path(folder), int(size), rank)
    if (Path(folder) / "mixtral").exists():
        found = [refused(Path(folder) / name, 2, None) for name in ("mixtral", "odd")]
        found += [refused(Path(folder) / "qwen3-2", 2, fault) for fault in (unsummed, unequal)]
        torch.save(found, Path(folder) / f"refused-{rank}.pt")
        torch.manual_seed(3)
        torch.save(vocabulary(Path(folder), int(size)), Path(folder) / f"vocabulary-{rank}.pt")
    leave_at_once()


def run_cells(cells: Sequence[Cell], folder: Path, size: int, rank: str) -> None:
    """Leave the results of this rank in the folder."""
    for cell in cells:
        result = run_cell(cell, model_folder(folder, cell), size, folder / f"{cell.name}-{size}")
        torch.save(result, folder / f"{cell.name}-{rank}.pt")


def model_folder(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.family}-{cell.changes['num_attention_heads']}{'-16bit' if cell.lora else ''}"


def write_model(cell: Cell, folder: Path) -> None:
    """Write a family's checkpoint with norms and biases that differ, in bfloat16 under adapters."""
    write_family(cell.family, folder, **cell.changes, **({"dtype": "bfloat16"} if cell.lora else {}))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
        weights[name] = weight.to(torch.bfloat16 if cell.lora else torch.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def run_matrix(folder: Path, cells: tuple[Cell, ...], ranks: int, size: int, module: str = __name__) -> None:
    """Leave the results of `ranks` processes and, as rank `alone`, of this one in the folder."""
    for cell in cells:
        if not model_folder(folder, cell).exists():
            write_model(cell, model_folder(folder, cell))

    def alone() -> None:
        for cell in cells:
            single = replace(cell, stage=0, offload=False)
            if not (folder / f"{single.name}-alone.pt").exists():
                result = run_cell(single, model_folder(folder, cell), 1, folder / f"{single.name}-1")
                torch.save(result, folder / f"{single.name}-alone.pt")

    run_processes(module, ranks, [str(size), str(folder), json.dumps([cell.name for cell in cells])], alone)


def check(folder: Path, cell: Cell, ranks: int, size: int) -> None:
    single = replace(cell, stage=0, offload=False)
    load = partial(torch.load, weights_only=False)
    alone = load(folder / f"{single.name}-alone.pt")
    every = [load(folder / f"{cell.name}-{rank}.pt") for rank in range(ranks)]
    exact = cell.dtype == "float32"
    bound = cell.bound if exact else 2e-2
    for rank, found in enumerate(every):
        assert set(found["start"]) == set(alone["start"])
        assert all(torch.equal(tensor, alone["start"][name]) for name, tensor in found["start"].items()) or cell.lora
        assert relative(found["start"], alone["start"]) < 1e-7
        assert found["shares"] == alone["shares"]
        assert found["computed"] == alone["computed"] or ranks > size or cell.key == "expert_parallel"
        for name, wanted in alone["scores"].items():
            np.testing.assert_allclose(found["scores"][name], wanted, rtol=0, atol=1e-5 if exact else 0.1, err_msg=name)
        print(cell.name, [f"{relative(*both):.1e}" for both in zip(found["gradients"], alone["gradients"], strict=True)])
        assert relative(found["gradients"][0], alone["gradients"][0]) < bound
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6 if exact else 2e-2)
        if not cell.router_loss:  # the loss of a micro-batch is not that of its halves
            found["metrics"].pop(ROUTER_LOSS, None), alone["metrics"].pop(ROUTER_LOSS, None)
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5 if exact else 5e-2, abs=1e-6 if exact else 1e-2)
        assert relative(found["weights"], alone["weights"]) < (1e-6 if exact else 1e-3)
        assert found["checksums"] == every[0]["checksums"]
        assert found["arrived"] == (alone["arrived"] and pytest.approx(alone["arrived"], rel=1e-3))
        first = every[rank % size]["raw"]
        embedding = [cut for name, (cut, _) in found["raw"].items() if name.endswith("embed_tokens.weight")]
        assert embedding in ([], [cell.key == "tensor_parallel"])
        for name, (cut, tensor) in found["raw"].items():
            assert torch.equal(tensor, (first if cut else every[0]["raw"])[name][1]), name
        assert found["held"] < alone["held"]
        if exact:
            assert found["resumed"][0] == found["resumed"][1]
            assert found["apart"] == 0.0
            assert found["skipped"] == 2
    if exact:
        files = sorted(path.relative_to(folder / f"{single.name}-1") for path in (folder / f"{single.name}-1").rglob("*.*"))
        assert any(path.suffix == ".safetensors" for path in files)
        for path in files:
            mine, wanted = folder / f"{cell.name}-{size}" / path, folder / f"{single.name}-1" / path
            if path.suffix == ".safetensors":
                rounded = cell.lora is not None and path.parent.name == "export"  # merged in bfloat16
                assert relative(load_file(mine), load_file(wanted)) < (1e-2 if rounded else 1e-6)
            elif path.name == "config.json":
                assert mine.read_text() == wanted.read_text()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_family("mixtral", folder / "mixtral")
    write_family("llama", folder / "odd", num_attention_heads=2, num_key_value_heads=1)
    run_matrix(folder, CELLS, 2, 2)
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_ranks_that_share_weights_take_the_steps_of_one(two_ranks: Path, cell: Cell) -> None:
    check(two_ranks, cell, 2, 2)


def test_log_probs_and_a_divergence_of_shared_rows_of_the_vocabulary_are_those_of_whole_ones(two_ranks: Path) -> None:
    torch.manual_seed(3)
    wanted = vocabulary(two_ranks, 1)
    for rank in range(2):
        for one, whole in zip(torch.load(two_ranks / f"vocabulary-{rank}.pt"), wanted, strict=True):
            torch.testing.assert_close(one, whole, rtol=0, atol=1e-6 * max(1.0, float(whole.abs().max())))


def test_ranks_refuse_weights_that_they_cannot_share(two_ranks: Path) -> None:
    expected = (
        "tensor_parallel 2: a mixtral model (somewhere) has experts, which are not cut; expected 1",
        "tensor_parallel 2: a llama model (somewhere) has 2 heads and 1 key heads; expected a divisor of both",
        *["tensor_parallel 2: a qwen3 model (somewhere) computes something else where ranks share its weights; expected 1"] * 2,
    )
    for rank in range(2):
        assert tuple(torch.load(two_ranks / f"refused-{rank}.pt")) == expected


def test_a_plan_counts_the_weights_that_a_rank_holds(two_ranks: Path) -> None:
    cell = CELLS[0]
    network = skeleton(ModelSection(path=str(model_folder(two_ranks, cell))))
    assert network is not None
    held = torch.load(two_ranks / f"{cell.name}-1.pt", weights_only=False)["held"]
    shape = shape_of(network)
    assert cut_shape(shape, 2).parameters == held
    assert shape.linear - cut_shape(shape, 2).linear == shape.linear // 2
    divided = torch.load(two_ranks / f"{CELLS[-1].name}-1.pt", weights_only=False)["held"]
    assert divided == shape.parameters // 2


@pytest.mark.nightly
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("ranks", "size"), [(4, 2), (4, 4)])
def test_more_ranks_that_share_weights_take_the_steps_of_one(tmp_path: Path, ranks: int, size: int, stage: int) -> None:
    """Two groups of two, with fillers where a group has fewer micro-batches, and one of four."""
    cells = tuple(cell for cell in WIDE if cell.stage == stage)
    run_matrix(tmp_path, cells, ranks, size)
    for cell in cells:
        check(tmp_path, cell, ranks, size)
