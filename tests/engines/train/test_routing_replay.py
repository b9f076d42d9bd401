"""Updates replay the experts that the trained model chose for its old log-probs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.data.expert_ids import widen
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.observe.metric_names import ROUTING_DIFFERENCE
from tests.engines.training import join_alone, random_batch, random_sequences
from tests.models.families import write_family

EXPERTS: Any = frozenset({"logprobs", "experts"})
PLAN = UpdatePlan([[list(range(6))]])
OBJECTIVE = PolicyObjective(routing=True)


def engine_of(folder: Any, *, checkpointing: bool) -> TrainEngine:
    model = ModelSection(path=str(folder), dtype="float32", gradient_checkpointing=checkpointing)
    train = TrainSection(optimizer=OptimizerSection(name="sgd"), max_grad_norm=None)
    return TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), train, 5.0, parity=ParitySection(), routing_replay=True))


def used_in(engine: TrainEngine, found: list[torch.Tensor]) -> None:
    """Collect the experts [tokens, experts per token] of the first layer, as they are used."""
    router = next(one for one in engine._network.model.modules() if type(one).__name__.endswith("TopKRouter"))
    router.register_forward_hook(lambda _, __, output: found.append(output[2].detach().sort(-1).values))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_updates_have_the_experts_of_the_old_log_probs(tmp_path: Any, family: str, checkpointing: bool) -> None:
    join_alone()
    # In one layer no choice depends on another one.
    folder = write_family(family, tmp_path, num_hidden_layers=1)
    engine = engine_of(folder, checkpointing=checkpointing)
    sequences = random_sequences(6)
    old = engine.score(sequences, EXPERTS)
    plain = engine_of(folder, checkpointing=False).score(sequences, frozenset({"logprobs"}))
    for one, other, sequence in zip(old, plain, sequences, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        assert one.experts.shape == (len(sequence.token_ids), 1, 2)
    batch = random_batch([replace(one, experts=score.experts) for one, score in zip(sequences, old, strict=True)])
    for row, score in enumerate(old):
        batch.arrays["old_logprobs"][row, : len(score.logprobs)] = score.logprobs
    first = engine.update(batch, PLAN, OBJECTIVE).metrics
    assert (first["val/ratio"], first[ROUTING_DIFFERENCE]) == (1.0, 0.0)
    moved = engine.score(sequences, EXPERTS)
    used: list[torch.Tensor] = []
    used_in(engine, used)
    second = engine.update(batch, PLAN, OBJECTIVE).metrics
    assert second["val/ratio"] != 1.0
    differs = []
    for row, (sequence, before, after) in enumerate(zip(sequences, old, moved, strict=True)):
        wanted = np.sort(widen(before.experts)[:, 0], -1)
        rows = used[0].reshape(6, -1, 2).numpy()[:, : len(wanted)]
        assert (rows == wanted).all((1, 2)).any(), "other experts were used"
        other = (wanted != np.sort(widen(after.experts)[:, 0], -1)).any(-1)[sequence.prompt_length - 1 : -1]
        differs.append(other[batch.arrays["action_mask"][row, : len(other)]])
    share = np.concatenate(differs).mean()
    assert share > 0.1
    assert second[ROUTING_DIFFERENCE] == pytest.approx(share)


def test_a_network_without_replay_returns_no_experts(tmp_path: Any) -> None:
    join_alone()
    model = ModelSection(path=str(write_family("mixtral", tmp_path)), dtype="float32")
    engine = TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), TrainSection(), 1.0, parity=ParitySection()))
    with pytest.raises(ValueError, match="replays no routing"):
        engine.score(random_sequences(1), EXPERTS)
