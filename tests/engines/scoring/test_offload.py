"""A frozen model works with copies for a turn and with its own waiting weights afterwards, also after a failure."""

import pytest
import torch
from torch import nn

from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.engines.scoring import frozen as score_engine
from rayrlhf.engines.scoring import reward_model
from rayrlhf.engines.scoring.offload import Offload, move_to_device


def network():
    torch.manual_seed(0)
    built = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7)).requires_grad_(False)
    built[1].weight = built[0].weight
    return built


def places(built):
    return {name: tensor.data_ptr() for name, tensor in built.state_dict().items()}


def test_a_turn_works_with_copies_and_the_same_memory_as_before_is_there_after_it():
    built, fetched = network(), []

    def fetch(tensor):
        fetched.append(tensor.clone())
        return fetched[-1]

    before, values = places(built), {name: tensor.clone() for name, tensor in built.state_dict().items()}
    offload = Offload(built, fetch)
    for _ in range(2):
        assert places(built) == before
        with offload.in_place():
            assert not set(places(built).values()) & set(before.values())
            assert all(torch.equal(tensor, values[name]) for name, tensor in built.state_dict().items())
            assert built[1].weight is built[0].weight
    assert places(built) == before
    assert len(fetched) == 2 * (len(before) - 1)  # the tied weight is one


def test_a_turn_that_fails_gives_its_memory_back():
    built = network()
    before, offload = places(built), Offload(built, torch.clone)
    with pytest.raises(ZeroDivisionError), offload.in_place():
        raise ZeroDivisionError
    assert places(built) == before


def test_the_memory_of_a_turn_returns_to_the_device(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    with Offload(network(), torch.clone).in_place():
        assert not emptied
    with Offload(network(), None).in_place():
        pass
    assert emptied == [True]


def test_a_reward_model_holds_linear_weights_in_its_dtype_and_scores_the_same(monkeypatch, tmp_path):
    from rayrlhf.tools.bench.ppo_step import write_reward_model

    _, folder = write_reward_model("builtin:tiny?layers=1&hidden=64&context=64", tmp_path / "reward")
    section = RewardModelSection(model=ModelSection(path=folder, dtype="bfloat16"), template="{prompt}{response}")
    held = reward_model.RewardModelEngine(section)
    monkeypatch.setattr(reward_model, "hold_linear_weights_in", lambda *_: None)
    rounded_in_each_forward = reward_model.RewardModelEngine(section)
    assert held.score(["a", "b"], ["cd", "e"]).tolist() == rounded_in_each_forward.score(["a", "b"], ["cd", "e"]).tolist()
    linear = [m for m in held._scorer.network.model.modules() if isinstance(m, nn.Linear)]
    assert {module.weight.dtype for module in linear} == {torch.bfloat16}
    assert held._scorer.network.v_head.summary.weight.dtype == torch.float32


@pytest.mark.parametrize(("device", "offload"), [("meta", False), ("cpu", True), ("cpu", False)])
def test_what_is_not_offloaded_goes_to_its_device_and_stays_there(device, offload):
    built = network()
    turn = move_to_device(built, torch.device(device), offload=offload)
    with turn.in_place():
        assert {tensor.device.type for tensor in built.state_dict().values()} == {device}
    assert {tensor.device.type for tensor in built.state_dict().values()} == {device}


@pytest.mark.parametrize("wanted", [False, True])
def test_both_engines_settle_their_model_as_the_configuration_says_and_score_within_a_turn(monkeypatch, wanted, tmp_path):
    import numpy as np

    from rayrlhf.data.records import TokenSequence
    from rayrlhf.tools.bench.ppo_step import write_reward_model

    told, turns = [], []

    class Turn(Offload):
        def in_place(self):
            turns.append(self)
            return super().in_place()

    def settled(network, device, *, offload):
        told.append(offload)
        return Turn(network, torch.clone if offload else None)

    monkeypatch.setattr(score_engine, "move_to_device", settled)
    monkeypatch.setattr(reward_model, "move_to_device", settled)
    policy, reward = write_reward_model("builtin:tiny?layers=1&hidden=64&context=64", tmp_path / "reward")
    reference = score_engine.FrozenEngine(ModelSection(path=policy, dtype="float32"), 1024, offload=wanted)
    (read,) = reference.score([TokenSequence(np.arange(3, 9, dtype=np.int32), 2)], frozenset({"logprobs"}))
    assert np.isfinite(read.logprobs).all()
    section = RewardModelSection(
        model=ModelSection(path=reward, dtype="float32"), template="{prompt}{response}", offload=wanted
    )
    assert np.isfinite(reward_model.RewardModelEngine(section).score(["a"], ["b"])).all()
    assert told == [wanted, wanted]
    assert len(turns) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_is_left_of_a_turn():
    built, device = network(), torch.device("cuda")
    turn = move_to_device(built, device, offload=True)
    before = torch.cuda.memory_reserved()
    with turn.in_place():
        assert {tensor.device.type for tensor in built.state_dict().values()} == {"cuda"}
    assert torch.cuda.memory_reserved() == before
    assert all(tensor.is_pinned() for tensor in built.state_dict().values())
