"""Two ranks do what one does, at every ZeRO stage; run in processes of their own, as actors would.

The same processes then move a state between numbers of ranks (`resized`).
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.algorithms.importance import moved_too_far
from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import OptimizerSection, SharePrefixes, TrainSection
from rayrlhf.engines.objectives.base import POLICY_KL
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from tests.engines.train import resized
from tests.engines.training import (
    free_port,
    grouped_sequences,
    join_alone,
    leave_at_once,
    random_batch,
    random_sequences,
    weights_of,
    write_llama,
)

STAGES = (0, 1, 2, 3)
SAMPLES = 7
OBJECTIVE = SharedObjective(PolicyObjective(), ValueObjective())
PLAN = UpdatePlan([[[3, 1, 6], [0, 5, 2, 4]], [[5], [0, 1, 2, 3, 4, 6]]])
"""Uneven on purpose: an optimizer step of one sample leaves the second rank nothing but fillers."""
GROUPED = UpdatePlan([[range(12)], [range(8), range(8, 12)]])


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """One rank's part: updates at each stage, the results left in the folder."""
    batch = random_batch(random_sequences(SAMPLES))
    for stage in STAGES:
        engine = engine_at(folder / "model", stage)
        report = engine.update(batch, PLAN, OBJECTIVE)
        stopped = engine_at(folder / "model", stage, early_stop_kl=1e-9).update(batch, PLAN, OBJECTIVE)
        result = {
            "weights": weights_of(engine), "metrics": report.metrics, "norms": report.grad_norms, "tokens": report.tokens,
            "last_kl": stopped.step_metrics[-1][POLICY_KL], "stopped": stopped.stopped_early, "steps": stopped.optimizer_steps,
        }  # fmt: skip
        engine.save_state(folder / f"state-{ranks}-{stage}")
        resumed = engine_at(folder / "model", stage)
        resumed.load_state(folder / f"state-{ranks}-{stage}")
        result["resumed"] = [e.update(batch, PLAN, OBJECTIVE).metrics for e in (engine, resumed)]
        apart = engine_at(folder / "model", stage, share_prefixes="auto" if ranks > 1 else "off", tokens=70)
        report = apart.update(random_batch(grouped_sequences(3, 4)), GROUPED, OBJECTIVE)
        result["grouped"] = {"weights": weights_of(apart), "shared": report.shared_fraction, "metrics": report.metrics}
        torch.save(result, folder / f"result-{ranks}-{rank}-{stage}.pt")


def engine_at(
    model: Path, stage: int, early_stop_kl: float | None = None, share_prefixes: SharePrefixes = "auto", tokens: int = 30
) -> TrainEngine:
    train = TrainSection(
        zero_stage=stage,
        micro_batch_tokens=tokens,
        optimizer=OptimizerSection(name="sgd"),
        max_grad_norm=0.5,
        early_stop_kl=early_stop_kl,
        share_prefixes=share_prefixes,
    )
    return TrainEngine(
        TrainEngineSpec(
            ModelSection(path=str(model), dtype="float32"), frozenset({"lm", "value"}), train, 0.5, parity=ParitySection()
        )
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a world of two in processes of their own, and of this process alone, at work side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    write_llama(folder / "model")
    code, port = f"from {__name__} import main; main()", free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), "2", str(port), str(folder)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    join_alone()
    run_rank(0, 1, folder)
    resized.alone_in_between(folder, processes)
    errors = [process.communicate(timeout=500)[1].decode() for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return folder


def main() -> None:
    rank, ranks, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    join(ProcessGroupSpec(int(rank), int(ranks), "127.0.0.1", int(port), timeout_seconds=300))
    run_rank(int(rank), int(ranks), Path(folder))
    resized.in_a_world_of_two(int(rank), Path(folder))
    leave_at_once()


def load(folder: Path, ranks: int, rank: int, stage: int) -> dict:
    return torch.load(folder / f"result-{ranks}-{rank}-{stage}.pt", weights_only=False)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_steps_of_one(results: Path, stage: int) -> None:
    alone = load(results, 1, 0, 0)
    first, second = load(results, 2, 0, stage), load(results, 2, 1, stage)
    for name, tensor in alone["weights"].items():
        np.testing.assert_allclose(first["weights"][name], tensor, rtol=0, atol=1e-5, err_msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name])
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert first["tokens"] + second["tokens"] == alone["tokens"]
    assert min(first["tokens"], second["tokens"]) > 0.3 * alone["tokens"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_with_shared_prefixes_take_the_steps_of_one_without(results: Path, stage: int) -> None:
    alone = load(results, 1, 0, 0)["grouped"]
    assert alone["shared"] == 0
    for rank in (0, 1):
        found = load(results, 2, rank, stage)["grouped"]
        assert found["shared"] > 0.2
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)
        for name, tensor in alone["weights"].items():
            np.testing.assert_allclose(found["weights"][name], tensor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_early_stopping_is_decided_alike_on_all_ranks(results: Path, stage: int) -> None:
    alone = load(results, 1, 0, stage)
    for rank in (0, 1):
        result = load(results, 2, rank, stage)
        assert (result["stopped"], result["steps"]) == (alone["stopped"], alone["steps"])
        assert result["last_kl"] == pytest.approx(alone["last_kl"], rel=1e-3, abs=1e-5)
        assert result["stopped"] == moved_too_far(result["last_kl"], 1e-9)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_world_continues_bit_for_bit(results: Path, stage: int) -> None:
    for rank in (0, 1):
        continued, resumed = load(results, 2, rank, stage)["resumed"]
        assert continued == resumed


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_then_one_then_two_end_where_two_end(results: Path, stage: int) -> None:
    for rank in range(2):
        expected = torch.load(results / f"undisturbed-{rank}-{stage}.pt")
        steps, moved = torch.load(results / f"moved-{rank}-{stage}.pt")
        assert steps == 6
        assert {name: float((moved[name] - value).abs().max()) for name, value in expected.items()} == pytest.approx(
            dict.fromkeys(expected, 0.0), abs=1e-6
        )


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_without_one_rank_s_part_or_of_another_model_is_refused(results: Path, tmp_path: Path, stage: int) -> None:
    join_alone()
    write_llama(tmp_path / "model", layers=3)
    engine = resized.engine_at(tmp_path, stage)
    with pytest.raises(UserError, match="no training state in it"):
        engine.load_state(tmp_path / "nothing", resized=True)
    if stage == 3:
        with pytest.raises(UserError, match="of another model"):
            engine.load_state(results / "first-3", resized=True)
