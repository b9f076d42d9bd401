"""Contract of train backends: a second one in plain torch trains as DeepSpeed does, and nothing above knows which is used."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.train.backends.base import StateFiles, TrainBackend, serialized
from rayrlhf.engines.train.engine import TRAIN_BACKENDS, TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network import Network
from rayrlhf.models.network_io import NetworkOutput
from tests.engines.training import join_alone, random_batch, random_sequences, weights_of, write_llama

PACKAGE = Path(__file__).parents[4] / "rayrlhf"
READS_ZERO_STAGE = (
    "engines/train/backends/deepspeed",
    "config/train.py",
    "tools/launch/memory_plan.py",
    "tools/launch/remedy.py",
    "tools/starters/trl_fields.py",  # names the key in a hint
    "tools/gpu_check/",  # sets each stage, to check it
)
DEEPSPEED_VERBS = re.compile(r"set_gradient_accumulation|scale_wrt_gas|clip_grad\b|ds_id|GatheredParameters|allreduce\b")


class PlainTorchBackend:
    """A backend for one rank, without sharding."""

    shards_parameters = all_ranks_must_forward = False

    @classmethod
    def weight_shards(cls, train: TrainSection, dtype: torch.dtype, device: torch.device) -> None:
        return None

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer) -> None:
        self._network = network
        self._optimizer = optimizer

    @classmethod
    def wrap(cls, network: Network, optimizer: torch.optim.Optimizer, train: TrainSection, dtype: torch.dtype) -> Self:
        return cls(network, optimizer)

    def forward(self, *inputs: Any) -> NetworkOutput:
        return self._network(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), max_norm or float("inf"))
        if not norm.isfinite():
            return self.discard()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def discard(self) -> float:
        self._optimizer.zero_grad()
        return float("nan")

    def zero_grad(self) -> None:
        for parameter in self._network.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        yield

    def capture_state(self, counters: Mapping[str, int]) -> StateFiles:
        parts = [self._network.state_dict(), self._optimizer.state_dict(), dict(counters)]
        return {"plain.pt": serialized(parts)}

    def load_state(self, folder: Path) -> Mapping[str, int]:
        network, optimizer, counters = torch.load(folder / "plain.pt", weights_only=True)
        self._network.load_state_dict(network)
        self._optimizer.load_state_dict(optimizer)
        return counters

    def load_resized_state(self, folder: Path) -> Mapping[str, int]:
        return self.load_state(folder)


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    monkeypatch.setitem(TRAIN_BACKENDS, "plain", PlainTorchBackend)


def engine_on(backend: str, folder: Path, **train: Any) -> TrainEngine:
    section = TrainSection(micro_batch_size=2, max_grad_norm=0.5, **train)
    model = ModelSection(path=str(folder), dtype="float32")
    return TrainEngine(TrainEngineSpec(model, frozenset({"lm", "value"}), section, 1e-2, backend=backend))


def update(engine: TrainEngine, seed: int) -> Any:
    batch = random_batch(random_sequences(6, seed=seed), seed=seed)
    return engine.update(batch, UpdatePlan([[[0, 1, 2], [3, 4, 5]]]), SharedObjective(PolicyObjective(), ValueObjective()))


@pytest.mark.parametrize("guard", [None, 1.0001])
def test_an_update_in_plain_torch_gives_the_weights_and_norms_of_deepspeed(tmp_path, guard):
    model = write_llama(tmp_path / "model")
    found = {}
    for backend in ("deepspeed", "plain"):
        engine = engine_on(backend, model, ratio_guard=guard)
        report = update(engine, seed=1)
        found[backend] = (report.grad_norms, report.guarded_steps, weights_of(engine))
    torch.testing.assert_close(found["plain"], found["deepspeed"], rtol=0, atol=1e-6)


def test_a_state_of_another_backend_continues_bit_for_bit(tmp_path):
    engine = engine_on("plain", write_llama(tmp_path / "model"))
    update(engine, seed=1)
    engine.save_state(tmp_path / "state")
    captured = engine.capture_state()
    expected = update(engine, seed=2).metrics
    weights = weights_of(engine)
    for restore in (lambda: engine.load_captured([captured]), lambda: engine.load_state(tmp_path / "state")):
        restore()
        assert engine.optimizer_steps == 2
        assert update(engine, seed=2).metrics == expected
        assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(engine).items())


def test_both_backends_have_all_members_of_the_protocol():
    members = [name for name in vars(TrainBackend) if not name.startswith("_")]
    assert len(members) == 11
    for backend in TRAIN_BACKENDS.values():
        assert [name for name in members if not callable(getattr(backend, name, None))] == []


def test_only_the_deepspeed_backend_its_config_and_the_planner_read_zero_stage():
    readers = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "zero_stage" in path.read_text("utf-8")}
    assert {reader for reader in readers if not reader.startswith(READS_ZERO_STAGE)} == set()


def test_only_backends_use_deepspeed_verbs():
    files = [path for path in (PACKAGE / "engines").rglob("*.py") if "backends" not in path.parts]
    assert [path.name for path in files if DEEPSPEED_VERBS.search(path.read_text("utf-8"))] == []
