"""The recipes hold the values of their papers, key by key, and each makes a valid run."""

import pytest

from rayrlhf.config.loading.describe import describe
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.loading.presets import PRESETS, RECIPES
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from tests.config.loading.test_presets import value_at

KEYS = {
    "critic": "critic.kind",
    "pretrain": "critic.pretrain_steps",
    "critic_rate": "critic.learning_rate",
    "samples": "rollout.samples_per_prompt",
    "temperature": "rollout.temperature",
    "refill": "rollout.refill_rounds",
    "kl": "algorithm.kl.estimator",
    "placement": "algorithm.kl.placement",
    "beta": "algorithm.kl.coefficient",
    "target": "algorithm.kl.target",
    "buffer": "algorithm.shaping.overlong_buffer",
    "overlong": "algorithm.shaping.overlong_penalty",
    "estimator": "algorithm.advantage.estimator",
    "gamma": "algorithm.advantage.gamma",
    "lam": "algorithm.advantage.lam",
    "lam_alpha": "algorithm.advantage.lam_alpha",
    "critic_lam": "algorithm.advantage.critic_lam",
    "whiten": "algorithm.advantage.whiten",
    "loss": "algorithm.policy_loss.name",
    "low": "algorithm.policy_loss.clip_low",
    "high": "algorithm.policy_loss.clip_high",
    "aggregation": "algorithm.policy_loss.loss_aggregation",
    "length": "algorithm.policy_loss.loss_aggregation_length",
    "positive": "algorithm.policy_loss.positive_coefficient",
    "value_clip": "algorithm.value_loss.clip",
    "rate": "train.learning_rate",
    "epochs": "train.epochs",
    "tau_pos": "algorithm.policy_loss.temperature_positive",
    "tau_neg": "algorithm.policy_loss.temperature_negative",
    "divergence": "algorithm.policy_loss.divergence",
    "threshold": "algorithm.policy_loss.threshold",
    "weight_high": "algorithm.policy_loss.weight_high",
    "share": "algorithm.policy_loss.share",
    "cov_low": "algorithm.policy_loss.cov_low",
    "cov_high": "algorithm.policy_loss.cov_high",
    "penalty": "algorithm.policy_loss.penalty",
    "level": "algorithm.off_policy_correction.level",
    "mode": "algorithm.off_policy_correction.mode",
    "weight_from": "algorithm.off_policy_correction.low",
    "weight_to": "algorithm.off_policy_correction.high",
    "decay": "train.optimizer.weight_decay",
    "shape": "train.schedule.shape",
    "lr_warmup": "train.schedule.warmup_steps",
}
CLIP = {"loss": "ppo", "low": 0.2, "high": 0.2}
GROUP = {"critic": "none", "temperature": 1.0, "epochs": 1}
PLAIN = {**GROUP, "samples": 8, "beta": 0, "estimator": "grpo", "whiten": False, "rate": 1e-6}
VALUES = {
    "critic": "separate", "critic_rate": 2e-6, "temperature": 1.0, "beta": 0, "estimator": "gae", "gamma": 1.0,
    "critic_lam": 1.0, "whiten": True, "rate": 1e-6, "epochs": 1,
}  # fmt: skip
TABLE = {
    "ppo": {
        "critic": "separate", "samples": 1, "temperature": 1.0, "kl": "k1", "placement": "reward", "beta": 0.02, "target": None,
        "estimator": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True, **CLIP, "aggregation": "token", "value_clip": 0.2,
        "epochs": 1,
    },
    "vc-ppo": {
        **VALUES, **CLIP, "pretrain": 100, "samples": 1, "lam": 0.95, "aggregation": "token",
    },
    "vapo": {
        **VALUES, **CLIP, "pretrain": 50, "samples": 16, "lam_alpha": 0.05, "high": 0.28, "positive": 0.1,
        "aggregation": "token",
    },
    "grpo": {
        **GROUP, "samples": 64, "kl": "k3", "placement": "loss", "beta": 0.04, "target": None, "estimator": "grpo",
        "whiten": False,
        **CLIP, "aggregation": "sequence", "rate": 1e-6,
    },
    "dr-grpo": {
        **GROUP, "samples": 8, "beta": 0, "estimator": "dr_grpo", "whiten": False, **CLIP, "aggregation": "constant",
        "rate": 1e-6,
    },
    "dapo": {
        **GROUP, "samples": 16, "refill": 10, "beta": 0, "buffer": 0.2, "overlong": 1.0, "estimator": "grpo", "whiten": False,
        "loss": "ppo", "low": 0.2, "high": 0.28, "aggregation": "token", "rate": 1e-6,
    },
    "rloo": {
        **GROUP, "samples": 2, "kl": "k1", "placement": "reward", "beta": 0.05, "target": None, "estimator": "rloo",
        "whiten": False,
        **CLIP, "aggregation": "constant", "length": 1, "rate": 1e-6,
    },
    "reinforce++": {
        **GROUP, "samples": 1, "kl": "k1", "placement": "reward", "beta": 1e-4, "target": None, "estimator": "reinforce++",
        "gamma": 1.0, "whiten": True, **CLIP, "aggregation": "token", "rate": 5e-7,
    },
    "reinforce++-baseline": {
        **GROUP, "samples": 8, "kl": "k2", "placement": "loss", "beta": 1e-5, "target": None,
        "estimator": "reinforce++-baseline",
        "gamma": 1.0, "whiten": True, **CLIP, "aggregation": "token", "rate": 5e-7,
    },
    "remax": {
        **GROUP, "samples": 1, "kl": "k1", "placement": "reward", "beta": 0.05, "target": None, "estimator": "remax",
        "gamma": 0.99, "whiten": False, **CLIP, "aggregation": "constant", "length": 1, "rate": 1e-6, "decay": 0.1,
        "shape": "cosine", "lr_warmup": 0,
    },
    "gspo": {
        **GROUP, "samples": 8, "beta": 0, "estimator": "grpo", "whiten": False, "loss": "gspo", "low": 3e-4, "high": 4e-4,
        "aggregation": "sequence", "rate": 1e-6,
    },
    "cispo": {
        **GROUP, "samples": 8, "refill": 10, "beta": 0, "buffer": 0.2, "overlong": 1.0, "estimator": "grpo", "whiten": False,
        "loss": "cispo", "high": 4.0, "aggregation": "token", "rate": 1e-6,
    },
    "sapo": {**PLAIN, "loss": "sapo", "tau_pos": 1.0, "tau_neg": 1.05, "aggregation": "sequence"},
    "gmpo": {**PLAIN, "loss": "gmpo", "low": 0.4, "high": 0.4, "aggregation": "sequence"},
    "dppo": {**PLAIN, "loss": "dppo", "divergence": "tv", "threshold": 0.15, "aggregation": "token"},
    "topr": {**PLAIN, "estimator": "dr_grpo", "loss": "topr", "weight_high": 1.0, "aggregation": "constant"},
    "clip-cov": {
        **PLAIN, "loss": "clip_cov", "share": 2e-4, "cov_low": 1.0, "cov_high": 5.0, "aggregation": "token", "rate": 5e-7,
    },
    "kl-cov": {**PLAIN, "loss": "kl_cov", "share": 2e-3, "penalty": 1.0, "aggregation": "token", "rate": 5e-7},
    "opo": {**PLAIN, **CLIP, "estimator": "opo", "aggregation": "token"},
    "maxrl": {**PLAIN, **CLIP, "estimator": "maxrl", "aggregation": "token"},
    "gdpo": {**PLAIN, **CLIP, "estimator": "gdpo", "aggregation": "token"},
    "icepop": {
        **PLAIN, **CLIP, "aggregation": "token", "level": "token", "mode": "mask", "weight_from": 0.5, "weight_to": 5.0,
    },
}  # fmt: skip


def leaves(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_values_of_its_source_and_no_others(name):
    assert leaves(RECIPES[name]) == {KEYS[key]: value for key, value in TABLE[name].items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_valid_run_with_a_plan_and_no_warning(name, minimal):
    given = ["teacher.model.path=builtin:tiny"] if "teacher" in PRESETS[name] else []
    config = load_config(PPOConfig, minimal, [f"preset={name}", *given])
    for key, value in leaves(PRESETS[name]).items():
        found = value_at(config, key)
        assert found == (tuple(value) if isinstance(value, list) else value), key
    plan = describe(config)
    assert "policy: builtin:tiny" in plan
    assert "warning" not in plan


def test_the_overlong_buffer_of_dapo_is_a_share_of_the_longest_response(minimal):
    config = load_config(PPOConfig, minimal, ["preset=dapo", "rollout.max_new_tokens=20480"])
    assert config.overlong_tokens == 4096


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "sapo"])
def test_another_loss_over_a_preset_has_its_own_defaults(name, loss, minimal):
    section = load_config(PPOConfig, minimal, [f"preset={name}", f"algorithm.policy_loss.name={loss}"]).algorithm.policy_loss
    assert section.name == loss
    if loss == RECIPES[name]["algorithm"]["policy_loss"]["name"]:
        assert section.loss_aggregation == TABLE[name]["aggregation"]
    else:
        assert section == type(section)(name=loss)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("{name: gspo, clip_low: 0.2, clip_high: 0.2}", "gspo clips the ratio of a whole response"),
        ("{name: ppo, clip_low: 0.0003, clip_high: 0.0004}", "ppo clips token ratios"),
        ("{name: cispo, clip_high: 0.2}", "cispo bounds the weight at 1 + clip_high = 1.2"),
    ],
)
def test_the_clip_range_of_another_loss_is_one_line_of_warning_in_the_plan(loss, words, minimal):
    found = [
        line
        for line in describe(load_config(PPOConfig, minimal, [f"algorithm.policy_loss={loss}"])).splitlines()
        if "warn" in line
    ]
    assert len(found) == 1
    assert found[0].startswith(f"warning: algorithm.policy_loss: {words}")


def test_an_unknown_preset_is_an_error_with_the_nearest_one(minimal):
    with pytest.raises(UserError, match=r"^command line: preset: unknown preset drgrpo; did you mean dr-grpo\?"):
        load_config(PPOConfig, minimal, ["preset=drgrpo"])
