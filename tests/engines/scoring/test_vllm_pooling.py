"""vLLM's pooling mode gives the rewards of transformers' classifiers; what it does not support is refused in one line."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.engines.scoring.reward_model import STATISTICS_FILE, RewardModelEngine, check_reward_models
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.tools.bench.paired import in_new_process
from tests.engines.training import write_llama
from tests.models.families import write_family

PROMPTS = ["a question of some length that all of these share", "another", "c"] * 12
RESPONSES = [f"{'a long answer ' * (number % 5)}{number}" for number in range(36)]


def write_classifier(folder, labels, family="llama"):
    """A model of transformers' own class, with a head that is not close to 0."""
    from transformers import AutoModelForSequenceClassification

    start = write_family(family, folder / "start", vocab_size=259, pad_token_id=0)
    torch.manual_seed(labels)
    names = dict(enumerate(["helpful", "honest", "long"][:labels]))
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=labels, pad_token_id=0, id2label=names)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / STATISTICS_FILE).write_text(json.dumps({"mean": 0.3, "spread": 2.0}))
    return ModelSection(path=str(folder / "model"), dtype="float32")


def section(model, **changes):
    return RewardModelSection(model=model, template="{prompt}{response}", **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "family"), [(1, "qwen3"), (3, "llama")])
def test_rewards_are_those_of_torch_also_of_texts_that_are_cut_and_of_weighted_outputs(tmp_path, labels, family):
    model = write_classifier(tmp_path, labels, family)
    changes = {"normalize": True, "max_length": 60}
    if labels > 1:
        changes["outputs"] = {"helpful": 2.0, "2": -0.5}
    expected = RewardModelEngine(section(model, **changes)).score(PROMPTS, RESPONSES)
    for found in in_new_process(pooled, section(model, backend="vllm", kv_cache_gib=0.05, **changes)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 0.1


def pooled(section):
    """Rewards by vLLM, the second time from its prefix cache."""
    engine = RewardModelEngine(section)
    assert (engine.load_check, engine.shares_prefixes) == ("computed by vLLM", True)
    return [engine.score(PROMPTS, RESPONSES) for _ in range(2)]


@pytest.mark.slow
def test_sizes_without_a_kernel_are_one_line(tmp_path):
    from transformers import AutoModelForSequenceClassification

    start = write_llama(tmp_path / "start", vocabulary=259)
    AutoModelForSequenceClassification.from_pretrained(start, num_labels=1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = ModelSection(path=str(tmp_path / "model"), dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"reward.model: vLLM cannot serve .*: Unsupported CPU attention .*head_dim=8"):
            in_new_process(pooled, section(model, backend="vllm"))


def test_only_classifiers_of_sequences_are_served(tmp_path):
    llama = ModelSection(path=str(write_llama(tmp_path / "model", vocabulary=259)), dtype="float32")
    byte_tokenizer().save_pretrained(llama.path)
    with pytest.raises(UserError, match=r"reward.model.backend vllm: '.*' is a LlamaForCausalLM; expected a classifier of"):
        check_reward_models(section(llama, backend="vllm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "vllm", "offload": True}, "backend vllm does not support offload; remove it, or set backend: torch"),
        ({"backend": "vllm", "members": [ModelSection(path="x")]}, "backend vllm does not support members"),
        ({"backend": "vllm", "steps": {}}, "backend vllm does not support steps"),
        ({"kv_cache_gib": 1.0}, "kv_cache_gib has no effect with backend torch"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        RewardModelSection.model_validate({"model": {"path": "x"}, **changes})


def test_the_cache_has_the_given_size():
    sizes = [
        RewardModelSection(model=ModelSection(path="x"), backend="vllm", kv_cache_gib=gib).cache_bytes for gib in (None, 2)
    ]
    assert sizes == [2**29, 2**31]
