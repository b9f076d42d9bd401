"""Over-issued prompts: how many there are, and what they do not go with."""

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.errors import UserError


def test_the_prompts_of_a_step_are_rounded_up():
    counts = {(64, 0.0): 64, (64, 0.25): 80, (50, 0.1): 55, (3, 0.1): 4, (10, 0.1): 11}
    for (prompts, share), issued in counts.items():
        assert RolloutSection(prompts_per_step=prompts, overissue=share).issued_prompts == issued


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.determinism=exact", "run.determinism 'exact': which groups finish first depends on time; expected 'fast'"),
        ("async.max_staleness=1", "async.max_staleness 1: steps are sampled ahead"),
        ("rollout.refill_rounds=2", "rollout.refill_rounds 2: a round would wait"),
    ],
)
def test_what_needs_the_canceled_groups_is_refused_in_one_line(minimal, setting, message):
    settings = ["rollout.overissue=0.5", "rollout.samples_per_prompt=2", setting]
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert f"rollout.overissue 0.5 with {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_share_has_bounds(minimal):
    with pytest.raises(UserError, match=r"rollout\.overissue: .*expected >= 0"):
        load_config(PPOConfig, minimal, ["rollout.overissue=-0.1"])
