"""ArmoRM: a gating network weights several objectives by the prompt."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection, StepRewardSection
from rayrlhf.engines.scoring.reward_model import RewardModelEngine, check_reward_models
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.training import write_llama

HIDDEN, INNER, OBJECTIVES, TEMPERATURE = 32, 12, 5, 3.0
PROMPTS = [
    "is it warm?",
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]
RESPONSES = ["yes", "not today"]
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def head_tensors():
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "regression_layer.weight": (OBJECTIVES, HIDDEN),
        "reward_transform_matrix": (OBJECTIVES, OBJECTIVES),
        "gating.logit_scale": (1,),
        "gating.layers.0.weight": (INNER, HIDDEN),
        "gating.layers.0.bias": (INNER,),
        "gating.layers.1.weight": (INNER, INNER),
        "gating.layers.1.bias": (INNER,),
        "gating.layers.2.weight": (OBJECTIVES, INNER),
        "gating.layers.2.bias": (OBJECTIVES,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_gated(folder, tensors):
    """Write a random model with the names and the configuration of RLHFlow/ArmoRM-Llama3-8B-v0.1."""
    write_llama(folder, vocabulary=259)
    trunk = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith("lm_head")}
    save_file(trunk | tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    own = {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "gating_temperature": TEMPERATURE,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return RewardModelSection(model=ModelSection(path=str(folder), dtype="float32"))


def expected_score(folder, tensors, prompt, response):
    """The formula of the model's card, on the states of transformers, with loops."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tokenizer = AutoTokenizer.from_pretrained(folder)
    opening = "".join(f"<{turn['role']}>{turn['content']}|" for turn in turns)
    ids = tokenizer(f"{opening}<assistant>{response}|", add_special_tokens=False)["input_ids"]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    gate = states[len(opening) - 1]
    for layer in range(3):
        gate = weights[f"gating.layers.{layer}.weight"] @ (np.maximum(gate, 0) if layer else gate)
        gate = gate + weights[f"gating.layers.{layer}.bias"]
    gate = np.exp(gate / TEMPERATURE) / np.exp(gate / TEMPERATURE).sum() * weights["gating.logit_scale"][0]
    rewards, transform = weights["regression_layer.weight"] @ states[-1], weights["reward_transform_matrix"]
    return sum(gate[i] * sum(rewards[j] * transform[j, i] for j in range(OBJECTIVES)) for i in range(OBJECTIVES))


def test_the_reward_is_that_of_the_published_formula(tmp_path):
    tensors = head_tensors()
    engine = RewardModelEngine(write_gated(tmp_path, tensors))
    expected = [expected_score(tmp_path, tensors, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert abs(expected[0] - expected[1]) > 0.1
    np.testing.assert_allclose(engine.score(PROMPTS, RESPONSES), expected, rtol=1e-4)
    assert "not used" not in engine.load_check


def test_a_response_that_leaves_no_room_for_the_prompt_is_one_line(tmp_path):
    section = write_gated(tmp_path, head_tensors())
    engine = RewardModelEngine(section.model_copy(update={"max_length": 20}))
    engine.score(["x" * 40], ["ok"])
    with pytest.raises(UserError, match=r"max_length 20: its gating reads the prompt's end, which would be cut"):
        engine.score(["hi"], ["a long response, longer than all of it"])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"gating.layers.2.bias": None}, {}, "gating.layers.2.bias is missing"),
        ({"gating.layers.2.running_mean": torch.ones(INNER)}, {}, "gating.layers.2.running_mean is unknown"),
        (
            {"regression_layer.weight": torch.ones(OBJECTIVES * 3, HIDDEN)},
            {},
            "15 outputs of regression_layer.weight, a reward_transform_matrix",
        ),
        ({"reward_transform_matrix": None}, {}, "reward_transform_matrix is missing"),
        ({}, {"template": "{prompt}{response}"}, "remove reward.model.template"),
        ({}, {"outputs": {"1": 1.0}}, "remove reward.model.outputs"),
        ({}, {"steps": StepRewardSection()}, "remove reward.model.steps"),
        ({}, {"steps": StepRewardSection(separator="\n")}, "remove reward.model.steps"),
    ],
)
def test_what_is_not_the_gating_of_armorm_is_refused_by_name(tmp_path, changes, settings, message):
    tensors = {name: tensor for name, tensor in (head_tensors() | changes).items() if tensor is not None}
    section = write_gated(tmp_path, tensors)
    with pytest.raises(UserError, match=message):
        check_reward_models(section.model_copy(update=settings))
