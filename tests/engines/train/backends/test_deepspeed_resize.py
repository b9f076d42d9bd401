"""A state moves between numbers of ranks at every ZeRO stage: two ranks, then one, then two, as two all the way."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.train.backends import deepspeed as deepspeed_setup
from rayrlhf.engines.train.backends.deepspeed_resize import recut_each, recut_row
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.process_group import ProcessGroupSpec, join
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from tests.engines.training import free_port, join_alone, leave_at_once, random_batch, random_sequences, weights_of, write_llama

STAGES = (0, 1, 2, 3)
SAMPLES = 6
OBJECTIVE = SharedObjective(PolicyObjective(), ValueObjective())
PLAN = UpdatePlan([[[0, 1, 2], [3, 4, 5]]])
SOME_ARE_SHARDED = 1500
"""Of the tiny model's parameters the larger ones have more elements, the smaller ones less."""


def engine_at(folder: Path, stage: int) -> TrainEngine:
    train = TrainSection(zero_stage=stage, max_grad_norm=0.5)
    model = ModelSection(path=str(folder / "model"), dtype="float32")
    return TrainEngine(TrainEngineSpec(model, frozenset({"lm", "value"}), train, 1e-3))


def step(engine: TrainEngine, number: int) -> None:
    engine.update(random_batch(random_sequences(SAMPLES, seed=number), seed=number), PLAN, OBJECTIVE)


def in_a_world_of_two(rank: int, folder: Path) -> None:
    """Three updates at every stage, the state kept after the first; then the third once more, from what one rank left."""
    for stage in STAGES:
        engine = engine_at(folder, stage)
        step(engine, 0)
        engine.save_state(folder / f"first-{stage}")
        step(engine, 1)
        step(engine, 2)
        torch.save(weights_of(engine), folder / f"undisturbed-{rank}-{stage}.pt")
    (folder / f"left-{rank}").touch()
    while not (folder / "returned").exists():
        time.sleep(0.05)
    for stage in STAGES:
        engine = engine_at(folder, stage)
        engine.load_state(folder / f"second-{stage}", resized=True)
        step(engine, 2)
        torch.save([engine.optimizer_steps, weights_of(engine)], folder / f"moved-{rank}-{stage}.pt")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes and this one did in turns."""
    folder = tmp_path_factory.mktemp("worlds")
    write_llama(folder / "model")
    code, port = f"from {__name__} import main; main()", str(free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_setup, "PARTITION_THRESHOLD", SOME_ARE_SHARDED)
        others = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), port, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for rank in range(2)
        ]
        join_alone()
        while not all((folder / f"left-{rank}").exists() for rank in range(2)) and all(p.poll() is None for p in others):
            time.sleep(0.05)
        try:
            for stage in STAGES:
                engine = engine_at(folder, stage)
                engine.load_state(folder / f"first-{stage}", resized=True)
                step(engine, 1)
                engine.save_state(folder / f"second-{stage}")
        finally:
            (folder / "returned").touch()
            errors = [process.communicate(timeout=400)[1].decode() for process in others]
        for process, error in zip(others, errors, strict=True):
            assert process.returncode == 0, error[-3000:]
    return folder


def main() -> None:
    rank, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed_setup.PARTITION_THRESHOLD = SOME_ARE_SHARDED
    join(ProcessGroupSpec(int(rank), 2, "127.0.0.1", int(port), timeout_seconds=400))
    in_a_world_of_two(int(rank), Path(folder))
    leave_at_once()


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_then_one_then_two_end_where_two_end(worlds: Path, stage: int) -> None:
    for rank in range(2):
        expected = torch.load(worlds / f"undisturbed-{rank}-{stage}.pt")
        steps, moved = torch.load(worlds / f"moved-{rank}-{stage}.pt")
        assert steps == 6
        assert {name: float((moved[name] - value).abs().max()) for name, value in expected.items()} == pytest.approx(
            dict.fromkeys(expected, 0.0), abs=1e-6
        )


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_without_one_rank_s_part_or_of_another_model_is_refused(worlds: Path, tmp_path: Path, stage: int) -> None:
    join_alone()
    write_llama(tmp_path / "model", layers=3)
    engine = engine_at(tmp_path, stage)
    with pytest.raises(UserError, match="no training state in it"):
        engine.load_state(tmp_path / "nothing", resized=True)
    if stage == 3:
        with pytest.raises(UserError, match="of another model"):
            engine.load_state(worlds / "first-3", resized=True)


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)
counts = st.integers(1, 5)


def cut(row: torch.Tensor, ranks: int, multiple: int = 1) -> list[torch.Tensor]:
    """The row padded to equal pieces, as ZeRO cuts it."""
    size = -(-len(row) // (ranks * multiple)) * multiple
    return list(torch.cat([row, row.new_full((size * ranks - len(row),), torch.nan)]).split(size)) if size else [row] * ranks


@given(st.integers(1, 40), counts, counts, st.sampled_from([1, 2]))
def test_a_row_cut_for_some_ranks_is_recut_for_others(length, before, after, multiple):
    row = torch.arange(length, dtype=torch.float32) + 1
    size = -(-length // (after * multiple)) * multiple
    pieces = [recut_row(cut(row, before, multiple), length, rank, size) for rank in range(after)]
    assert [len(piece) for piece in pieces] == [size] * after
    np.testing.assert_array_equal(torch.cat(pieces), np.pad(row.numpy(), (0, size * after - length)))


@given(lengths, counts, counts)
def test_parameters_cut_each_by_itself_are_recut_each_by_itself(sizes, before, after):
    whole = [torch.arange(size, dtype=torch.float32) + 100 * index for index, size in enumerate(sizes)]
    saved = [torch.cat([cut(value, before)[rank] for value in whole]) for rank in range(before)]
    again = [recut_each(saved, sizes, rank, after) for rank in range(after)]
    for index, value in enumerate(whole):
        np.testing.assert_array_equal(torch.cat([pieces[index] for pieces in again])[: len(value)], value)
