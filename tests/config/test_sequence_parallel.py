"""Ranks that share rows: what divides what, and what is refused in one line before anything starts."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.models.sequence_parallel import key_copies
from rayrlhf.models.skeleton import check_row_split
from tests.models.families import write_family

SPLIT = "placement.policy={ranks: 4, sequence_parallel: 2}"


def test_old_spellings_split_nothing(minimal):
    config = load_config(PPOConfig, minimal, ["placement.policy.ranks=2", "placement.critic={ranks: 2}"])
    assert (config.placement.policy.sequence_parallel, config.placement.policy.data_ranks) == (1, 2)


def test_samples_are_split_over_groups(minimal):
    config = load_config(PPOConfig, minimal, [SPLIT, "train.mini_batch_size=2"])
    assert config.placement.policy.data_ranks == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["placement.policy={ranks: 3, sequence_parallel: 2}"], "sequence_parallel 2 does not divide ranks 3"),
        (["placement.critic={ranks: 2, sequence_parallel: 4}"], "sequence_parallel 4 does not divide ranks 2"),
        (["placement.policy.sequence_parallel=0"], "expected >= 1"),
        (["placement.reference.sequence_parallel=2"], "placement.reference.sequence_parallel: unknown key"),
        ([SPLIT, "train.mini_batch_size=1"], "is smaller than placement.policy.ranks 4 / sequence_parallel 2"),
        ([SPLIT, "model.lora={last_layers: 1}"], "placement.policy.sequence_parallel 2 with model.lora.last_layers"),
        (
            [
                "placement.critic={ranks: 2, sequence_parallel: 2}",
                "critic={kind: separate, model: {path: builtin:tiny, lora: {last_layers: 1}}}",
            ],
            "placement.critic.sequence_parallel 2 with model.lora.last_layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(minimal, settings, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_frozen_layers_that_are_not_cached_do_not_matter(minimal):
    lora = "model.lora={last_layers: 1}"
    for free in (["model.gradient_checkpointing=true"], ["train.zero_stage=3"], ["placement.policy.sequence_parallel=1"]):
        load_config(PPOConfig, minimal, [SPLIT, lora, *free])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", None),
        ("qwen3_moe", None),
        ("mistral", "has sliding-window attention"),
        ("gemma2", "has sliding-window attention"),
        ("qwen3_next", "has linear attention or state-space layers"),
        ("lfm2", "has linear attention or state-space layers"),
        ("mamba", "has linear attention or state-space layers"),
        ("phi3_longrope", "has rotary frequencies that depend on the longest sample"),
        ("bloom", "has an attention of its own"),
    ],
)
def test_models_whose_tokens_need_whole_rows_are_refused_before_weights_load(tmp_path, family, reason):
    folder = write_family(family, tmp_path / family)
    (folder / "model.safetensors").unlink()
    model = ModelSection(path=str(folder))
    check_row_split(model, "placement.policy.sequence_parallel", 1)
    if reason is None:
        check_row_split(model, "placement.policy.sequence_parallel", 2)
        return
    with pytest.raises(UserError) as caught:
        check_row_split(model, "placement.policy.sequence_parallel", 2)
    assert str(caught.value).startswith("placement.policy.sequence_parallel 2: a ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "copies"),
    [
        (8, 8, 4, 1),
        (8, 2, 2, 1),
        (8, 2, 4, 2),
        (8, 1, 4, 4),
        (12, 6, 4, 2),
        (24, 6, 4, 2),
        (12, 3, 2, 2),
        (9, 3, 2, 2),  # the ranks do not divide the heads: each holds whole rows of keys
        (14, 2, 4, 4),
    ],
)
def test_keys_are_held_as_often_as_heads_need_them(heads, key_heads, size, copies):
    assert key_copies(heads, key_heads, size) == copies
