"""What is read back from a disk may have been put there by somebody else."""

from pathlib import Path

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from tests.engines.training import join_alone, write_llama


class Planted:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(("stage", "name"), [(0, "mp_rank_00_model"), (2, "zero_pp_rank_0_mp_rank_00_optim")])
def test_code_planted_in_a_state_is_refused_and_not_run(tmp_path, stage, name, resized):
    join_alone()
    write_llama(tmp_path / "model")
    model = ModelSection(path=str(tmp_path / "model"), dtype="float32")
    engine = TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), TrainSection(zero_stage=stage), 1e-3))
    engine.save_state(tmp_path / "state")
    torch.save({"ranks": 1, "module": Planted(tmp_path / "run")}, tmp_path / f"state/state/{name}_states.pt")
    with pytest.raises(UserError, match="expected tensors and plain values only"):
        engine.load_state(tmp_path / "state", resized=resized)
    assert not (tmp_path / "run").exists()
