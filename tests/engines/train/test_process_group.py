"""Worlds of a process that come and go."""

import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from tests.engines.training import free_port, join_alone, write_llama


def engine_of(path):
    train = TrainSection(optimizer=OptimizerSection(name="sgd"), max_grad_norm=None)
    model = ModelSection(path=path, dtype="float32")
    return TrainEngine(TrainEngineSpec(model=model, heads=frozenset({"lm"}), train=train, learning_rate=1.0))


def test_an_engine_starts_in_a_world_that_another_library_began_after_ending_the_first(tmp_path):
    model = str(write_llama(tmp_path / "llama"))
    join_alone()
    engine_of(model)
    torch.distributed.destroy_process_group()  # as vLLM's engine does when it is closed
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        engine_of(model)
    finally:
        torch.distributed.destroy_process_group()
        join_alone()
