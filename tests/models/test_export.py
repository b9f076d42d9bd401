"""An exported reward model is a sequence classifier to transformers, and a reward model or critic here."""

import json
import os

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from rayrlhf.models.export import check_reward_model, save_network
from rayrlhf.models.network import build_network
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.models.value_head import find_head
from tests.engines.training import join_alone, random_sequences, write_llama
from tests.models.families import write_family


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


def test_a_pad_token_without_an_embedding_does_not_stop_the_export(reward_model, tmp_path):
    engine, _ = reward_model
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 259
    save_network(engine._network, dict(engine._network.model.state_dict()), tokenizer, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["pad_token_id"] == tokenizer.eos_token_id


@pytest.fixture
def published(tmp_path):
    """A checkpoint as published: bfloat16, a cache, and a generation config with a temperature but without do_sample."""
    from safetensors.torch import load_file, save_file

    folder = write_family("glm4_moe", tmp_path / "published")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors |= {name: torch.linspace(-0.5, 0.5, tensors[name].numel()) for name in biases}  # as a trained router has
    assert biases
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 1]}))
    return folder


def test_an_export_is_as_its_base_was_published(published, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    join_alone()
    section = ModelSection(path=str(published), dtype="float32")
    engine = TrainEngine(TrainEngineSpec(section, frozenset({"lm"}), TrainSection(), 0.0))
    umask = os.umask(0o022)
    try:
        engine.export(tmp_path / "export")
    finally:
        os.umask(umask)
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "export"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["dtype"], config.get("use_cache", True)) == ("bfloat16", True)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1]
    assert (generation["temperature"], generation["do_sample"]) == (0.6, True)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "export").iterdir()} == {"0o644"}
    ids = torch.arange(3, 83).view(2, 40)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (published, tmp_path / "export")
    ]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_a_reward_model_that_could_not_be_exported_is_refused_without_weights(tmp_path):
    folder = write_family("granite", tmp_path / "granite")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match="a granite model cannot become a reward model: transformers has no sequence classifier"
    ):
        check_reward_model(ModelSection(path=str(folder)))
    check_reward_model(ModelSection(path=str(write_family("llama", tmp_path / "llama"))))
