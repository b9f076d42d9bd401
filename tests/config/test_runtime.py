"""The section `async`: a key that is no Python name, the default that follows it, and what it cannot go with."""

import pytest

from rayrlhf.config.loading.load import dump_config, load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError


def test_sampling_does_not_run_ahead_by_default_and_nothing_is_corrected(minimal):
    config = load_config(PPOConfig, minimal)
    assert config.asynchronous.max_staleness == 0
    assert config.algorithm.off_policy_correction.level == "none"


def test_a_dumped_configuration_has_the_key_by_its_name_and_is_the_same_when_read(minimal, tmp_path):
    config = load_config(PPOConfig, minimal, ["async.max_staleness=2", "async.on_update=cut"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert "\nasync:\n" in path.read_text()
    assert load_config(PPOConfig, path) == config
    assert config.asynchronous.on_update == "cut"


def test_old_samples_are_weighed_unless_the_configuration_says_otherwise(minimal):
    ahead = load_config(PPOConfig, minimal, ["async.max_staleness=1"]).algorithm.off_policy_correction
    assert (ahead.level, ahead.mode) == ("token", "truncate")
    other = load_config(
        PPOConfig, minimal, ["async.max_staleness=1", "algorithm.off_policy_correction.high=3"]
    ).algorithm.off_policy_correction
    assert (other.level, other.high) == ("token", 3)
    chosen = load_config(PPOConfig, minimal, ["async.max_staleness=1", "algorithm.off_policy_correction.level=none"])
    assert chosen.algorithm.off_policy_correction.level == "none"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["async.max_staleness=1", "run.determinism=exact"], "async.max_staleness 1 cannot repeat bit for bit"),
        (["async.max_staleness=2", "rollout.refill_rounds=1", "rollout.samples_per_prompt=2"], "rollout.refill_rounds 1"),
        (
            ["teacher.model.path=builtin:tiny", "rollout.refill_rounds=1", "rollout.samples_per_prompt=2"],
            "a teacher learns from those too",
        ),
        (["async.max_stalenes=1"], "did you mean async.max_staleness?"),
        (["asynchronous.max_staleness=1"], "unknown key"),
        (["async.max_staleness=-1"], "expected >= 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(minimal, settings, expected):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, minimal, settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
