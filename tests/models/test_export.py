"""An exported reward model is a sequence classifier to transformers, and a reward model or critic here."""

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network import build_network
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.models.value_head import find_head
from tests.engines.training import join_alone, random_sequences, write_llama


@pytest.fixture
def reward_model(tmp_path):
    join_alone()
    start = write_llama(tmp_path / "start", vocabulary=259)
    byte_tokenizer().save_pretrained(start)
    section = ModelSection(path=str(start), dtype="float32")
    spec = TrainEngineSpec(section, frozenset({"value"}), TrainSection(), 0.0, head_init="normal", head_bias=False)
    engine = TrainEngine(spec)
    engine.export(tmp_path / "reward")
    return engine, tmp_path / "reward"


def test_transformers_gives_the_same_rewards_to_a_padded_batch(reward_model):
    from transformers import AutoModelForSequenceClassification

    engine, folder = reward_model
    sequences = random_sequences(4, vocabulary=200)
    for sequence in sequences:
        sequence.token_ids[:] += 3  # a pad token within a text would end it for transformers
    expected = [score.values[-1] for score in engine.score(sequences, frozenset({"values"}))]
    longest = max(len(sequence.token_ids) for sequence in sequences)
    ids = torch.zeros(4, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids).long()
        mask[row, : len(sequence.token_ids)] = 1
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.num_labels == 1
    found = classifier(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_critic_starts_from_it_with_its_head(reward_model):
    engine, folder = reward_model
    critic = build_network(ModelSection(path=str(folder), dtype="float32"), frozenset({"value"}), "zero", 0)
    stored = find_head(folder)
    assert critic.v_head is not None
    assert torch.equal(critic.v_head.summary.weight, engine._network.v_head.summary.weight)
    assert set(stored) == {"weight"}
    for name, parameter in critic.model.named_parameters():
        assert torch.equal(parameter, dict(engine._network.model.named_parameters())[name]), name
