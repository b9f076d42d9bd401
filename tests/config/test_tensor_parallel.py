"""Ranks that share weights: what divides what, and what is refused in one line before anything starts."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import SFTConfig
from rayrlhf.errors import UserError
from rayrlhf.models.skeleton import check_weight_split
from tests.models.families import write_family

CUT = "placement.policy={ranks: 4, tensor_parallel: 2}"


def test_samples_are_split_over_the_groups_that_share_weights(minimal):
    config = load_config(PPOConfig, minimal, [CUT, "train.mini_batch_size=2"])
    assert (config.placement.policy.data_ranks, config.placement.policy.group) == (2, 2)
    assert config.placement.critic.tensor_parallel == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["placement.policy={ranks: 3, tensor_parallel: 2}"], "tensor_parallel 2 does not divide ranks 3"),
        (["placement.critic={ranks: 2, tensor_parallel: 4}"], "tensor_parallel 4 does not divide ranks 2"),
        (["placement.policy.tensor_parallel=0"], "expected >= 1"),
        (
            ["placement.policy={ranks: 4, tensor_parallel: 2, sequence_parallel: 2}"],
            "sequence_parallel 2 with tensor_parallel 2: ranks share rows or weights, not both; expected 1 for one of them",
        ),
        ([CUT, "train.mini_batch_size=1"], "is smaller than placement.policy.ranks 4 / tensor_parallel 2"),
        ([CUT, "train.ema_decay=0.9"], "placement.policy.tensor_parallel 2 with train.ema_decay: an average is of whole"),
        (
            ["placement.critic={ranks: 2, tensor_parallel: 2}", "train.ema_decay=0.9"],
            "placement.critic.tensor_parallel 2 with train.ema_decay",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(minimal, settings, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["workers={count: [1, 2], tensor_parallel: 2}"], "tensor_parallel 2 needs one number as count, found a range"),
        (["workers={count: 3, tensor_parallel: 2}"], "tensor_parallel 2 does not divide count 3"),
        (
            ["workers={count: 2, tensor_parallel: 2}", "train.neftune_alpha=5"],
            "train.neftune_alpha: ranks draw different noise",
        ),
        (["workers={count: 4, tensor_parallel: 2}", "train.batch_size=1"], "smaller than workers.count 4 / tensor_parallel 2"),
    ],
)
def test_workers_of_supervised_training_are_checked_alike(tmp_path, settings, expected):
    path = tmp_path / "sft.yaml"
    path.write_text("model: {path: builtin:tiny}\ndata: {train: {path: rows.jsonl}}\n")
    with pytest.raises(UserError, match=expected):
        load_config(SFTConfig, path, settings)


@pytest.mark.parametrize(
    ("family", "changes", "size", "reason"),
    [
        ("llama", {"num_key_value_heads": 2}, 2, None),
        ("qwen3", {"num_key_value_heads": 2}, 2, None),
        ("llama", {}, 2, "has 2 heads and 1 key heads; expected a divisor of both"),
        ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, 2, "has 3 heads and 3 key heads"),
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 95}, 2, "has 95 features in gate_proj; expected a divisor"),
        ("mixtral", {}, 2, "has experts, which are not cut; expected 1"),
        ("phi3", {}, 2, "cuts o_proj in another way (rowwise_split_input); expected 1"),
        ("gpt2", {}, 2, "has no plan in transformers by which its layers are cut (tp_plan); expected 1"),
    ],
)
def test_models_whose_weights_cannot_be_cut_are_refused_before_they_load(tmp_path, family, changes, size, reason):
    folder = write_family(family, tmp_path / family, **changes)
    (folder / "model.safetensors").unlink()
    model = ModelSection(path=str(folder))
    check_weight_split(model, "placement.policy.tensor_parallel", 1)
    if reason is None:
        check_weight_split(model, "placement.policy.tensor_parallel", size)
        return
    with pytest.raises(UserError) as caught:
        check_weight_split(model, "placement.policy.tensor_parallel", size)
    assert str(caught.value).startswith(f"placement.policy.tensor_parallel {size}: a {family} model (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
