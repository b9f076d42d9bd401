"""Ranks that share experts: what divides what, and what is refused in one line before anything starts."""

import pytest

from rayrlhf.config.loading.describe import describe
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import SFTConfig
from rayrlhf.errors import UserError
from rayrlhf.models.skeleton import check_rank_groups
from tests.models.families import write_family

SHARED = "placement.policy={ranks: 4, expert_parallel: 2}"


def test_samples_are_split_over_all_ranks_that_share_experts(minimal):
    config = load_config(PPOConfig, minimal, [SHARED, "train.mini_batch_size=4"])
    assert (config.placement.policy.data_ranks, config.placement.policy.group) == (4, 1)
    assert "4 processes, experts split over 2" in describe(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["placement.policy={ranks: 3, expert_parallel: 2}"], "expert_parallel 2 does not divide ranks 3"),
        (["placement.critic={ranks: 2, expert_parallel: 4}"], "expert_parallel 4 does not divide ranks 2"),
        (
            ["placement.policy={ranks: 4, expert_parallel: 2, sequence_parallel: 2}"],
            "sequence_parallel 2 with expert_parallel 2: ranks share rows or experts, not both; expected 1 for one of them",
        ),
        (
            ["placement.policy={ranks: 4, expert_parallel: 2, tensor_parallel: 2}"],
            "tensor_parallel 2 with expert_parallel 2: ranks share weights or experts, not both; expected 1 for one of them",
        ),
        ([SHARED, "train.mini_batch_size=2"], "train.mini_batch_size 2 is smaller than placement.policy.ranks 4"),
        ([SHARED, "train.ema_decay=0.9"], "placement.policy.expert_parallel 2 with train.ema_decay: an average is of whole"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(minimal, settings, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_of_supervised_training_are_checked_alike(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model: {path: builtin:tiny}\ndata: {train: {path: rows.jsonl}}\n")
    with pytest.raises(UserError, match="expert_parallel 2 needs one number as count, found a range"):
        load_config(SFTConfig, path, ["workers={count: [1, 2], expert_parallel: 2}"])
    noisy = load_config(SFTConfig, path, ["workers={count: 2, expert_parallel: 2}", "train.neftune_alpha=5"])
    assert noisy.workers.expert_parallel == 2


@pytest.mark.parametrize(
    ("family", "size", "reason"),
    [
        ("qwen3_moe", 2, None),
        ("mixtral", 4, None),
        ("mixtral", 3, "has 4 experts; expected a divisor"),
        ("granitemoe", 2, None),
        ("llama", 2, "has no experts that ranks can share; expected 1"),
    ],
)
def test_models_whose_experts_cannot_be_shared_are_refused_before_they_load(tmp_path, minimal, family, size, reason):
    folder = write_family(family, tmp_path / family)
    (folder / "model.safetensors").unlink()
    ranks = load_config(PPOConfig, minimal, [f"placement.policy={{ranks: {size}, expert_parallel: {size}}}"]).placement.policy
    model = ModelSection(path=str(folder))
    if reason is None:
        check_rank_groups(model, "placement.policy", ranks)
        return
    with pytest.raises(UserError) as caught:
        check_rank_groups(model, "placement.policy", ranks)
    assert str(caught.value) == f"placement.policy.expert_parallel {size}: a {family} model ({folder}) {reason}"
