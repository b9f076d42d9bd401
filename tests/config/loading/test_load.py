"""Layers, strict validation and one-line errors; a dumped configuration is the same configuration."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.config.loading.load import differences, dump_config, load_config
from rayrlhf.config.loading.presets import PRESETS
from rayrlhf.config.loading.problems import known_keys
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

PLAIN_LOSS = {"algorithm": {"policy_loss": {"name": "ppo"}}}
KEYS = sorted(key for key in known_keys(PPOConfig, tree=PLAIN_LOSS) if ".0" not in key)


def message_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, path, overrides)
    return str(caught.value)


def test_a_minimal_file_takes_every_default_and_defaults_are_valid(minimal, tmp_path):
    config = load_config(PPOConfig, minimal)
    assert config.model.path == "builtin:tiny"
    assert config.run.root == Path("runs")
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(PPOConfig, dumped) == config


def test_overrides_lie_over_the_file_and_the_file_over_the_preset(minimal):
    minimal.write_text(minimal.read_text() + "preset: trl-classic\ntrain: {epochs: 2}\nalgorithm: {kl: {horizon: 7}}\n")
    config = load_config(PPOConfig, minimal, ["algorithm.kl.target=3", "train.epochs=9"])
    assert (config.train.epochs, config.algorithm.kl.target, config.algorithm.kl.horizon) == (9, 3.0, 7)
    assert config.train.learning_rate == 1.41e-5
    assert config.algorithm.kl.coefficient == 0.2


def test_an_override_can_name_the_preset_and_no_file_is_needed():
    config = load_config(
        PPOConfig, None, ["preset=trl-modern", "model.path=m", "reward.functions.0.name=f", "data.train.path=p"]
    )
    assert config.rollout.temperature == 0.7
    assert config.reward.functions[0].name == "f"


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("trl-")])
def test_a_preset_of_trl_is_valid_and_takes_the_mean_of_each_micro_batch(name, minimal):
    assert load_config(PPOConfig, minimal, [f"preset={name}"]).algorithm.parity.mini_batch_means


SAMPLES = {
    "run.name": "a-b.c",
    "run.root": "some/where/1e-6",
    "train.learning_rate": "1e-7",
    "train.max_grad_norm": "null",
    "train.optimizer.betas": "[0, 0.5]",
    "placement.overlap": "on",
    "placement.address": "'on'",
    "rollout.stop": "['\\n', 'null', '', '# x']",
    "data.system_prompt": "'a: b # \\u00e9'",
    "model.lora": "{last_layers: 3}",
    "model.chat_template": "chat.jinja",
    "reward.functions.1": "{name: x, arguments: {a: [1, {b: null}]}}",
    "run.steps": "3",
    "observe.live": "false",
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(sorted(SAMPLES))))
def test_a_dumped_configuration_loads_as_the_same_one_and_differences_name_what_was_set(minimal, tmp_path, keys):
    plain = load_config(PPOConfig, minimal)
    config = load_config(PPOConfig, minimal, [f"{key}={SAMPLES[key]}" for key in sorted(keys)])
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(PPOConfig, tmp_path / "again.yaml")
    assert again == config
    assert differences(config, again) == []
    changed = differences(plain, config)
    assert all(any(line.startswith(key) for line in changed) for key in keys)
    assert all(any(line.startswith(key) for key in keys) for line in changed)


def test_differences_show_old_and_new(minimal):
    plain = load_config(PPOConfig, minimal)
    other = load_config(PPOConfig, minimal, ["train.epochs=3", "rollout.stop=[x]", "reward.functions.1.name=f"])
    assert differences(plain, other) == [
        'rollout.stop: [] -> ["x"]',
        "train.epochs: 1 -> 3",
        'reward.functions.1.name: (absent) -> "f"',
        "reward.functions.1.weight: (absent) -> 1.0",
        "reward.functions.1.arguments: (absent) -> {}",
        "reward.functions.1.cache: (absent) -> false",
        'reward.functions.1.per: (absent) -> "response"',
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learnign_rate=1", "train.learnign_rate: unknown key; did you mean train.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("rollout.gama=1", "rollout.gama: unknown key; did you mean algorithm.advantage.gamma?"),
        ("reward.functions.0.nam=x", "reward.functions.0.nam: unknown key; did you mean reward.functions.0.name?"),
        ("run.qqq=1", "run.qqq: unknown key; expected one of name, root, seed, steps, resume, determinism"),
        ("train={epoch: 1}", "train.epoch: unknown key; did you mean train.epochs?"),
        ("train.epochs=0", "train.epochs: expected >= 1, found 0"),
        ("train.epochs=1.5", "train.epochs: expected a whole number, found 1.5"),
        ("train.epochs=true", "train.epochs: expected a whole number, found true"),
        ("train.epochs='5'", 'train.epochs: expected a whole number, found "5"'),
        ("train.learning_rate=fast", 'train.learning_rate: expected a number, found "fast"'),
        ("train.learning_rate=.inf", "train.learning_rate: expected a finite number, found Infinity"),
        ("rollout.temperature=0", "rollout.temperature: expected > 0, found 0"),
        ("placement.overlap=onn", "placement.overlap: expected 'auto', 'on' or 'off', found \"onn\"; did you mean on?"),
        ("observe.live=1", "observe.live: expected true or false, found 1"),
        ("run.name=5", "run.name: expected text, found 5"),
        ("run.name=a/b", "run.name: expected text that matches"),
        ("model=tiny", 'model: expected a section with keys and values, found "tiny"'),
        ("model={dtype: auto}", "model.path: required, but not given"),
        ("model.lora.target_modules=5", "model.lora.target_modules: expected a list or 'all-linear', found 5"),
        ("train.optimizer.betas=[1.0, 0.5]", "train.optimizer.betas.0: expected < 1"),
        ("data.train.template=hello", "data.train: template has no {prompt}, the place"),
        ("algorithm.kl={coefficient: 0, target: 6}", "algorithm.kl: target adapts the coefficient by factors"),
        ("algorithm.kl={placement: loss, target: 6}", "algorithm.kl: target adapts the coefficient of the reward"),
        (
            "algorithm.policy_loss={name: cispo, dual_clip: 3}",
            "algorithm.policy_loss: dual_clip has no effect with name 'cispo'",
        ),
        (
            "algorithm.policy_loss.loss_aggregation_length=9",
            "loss_aggregation_length has no effect without loss_aggregation 'constant'",
        ),
        (
            "algorithm.policy_loss.name=zzz",
            "algorithm.policy_loss.name: unknown name 'zzz'; expected one of ppo, gspo, cispo, sapo, gmpo",
        ),
        (
            "algorithm.off_policy_correction.rejection_low=0.5",
            "algorithm.off_policy_correction: rejection_low and rejection_high have no effect with rejection 'none'",
        ),
        (
            "algorithm.off_policy_correction={rejection: product, rejection_low: 2, rejection_high: 1}",
            "algorithm.off_policy_correction: rejection_low 2 is not below rejection_high 1",
        ),
        ("algorithm.policy_loss.name=gsop", "algorithm.policy_loss.name: unknown name 'gsop'; did you mean gspo?"),
        ("algorithm.policy_loss=5", "algorithm.policy_loss: expected a section with keys and values, found 5"),
        ("algorithm.policy_loss.name=5", "algorithm.policy_loss.name: expected the name of a loss or a path"),
        (
            "algorithm.policy_loss={name: gspo, clip_hihg: 1}",
            "algorithm.policy_loss.clip_hihg: unknown key; did you mean algorithm.policy_loss.clip_high?",
        ),
        (
            "algorithm.policy_loss={name: cispo, clip: 1}",
            "algorithm.policy_loss.clip: unknown key; did you mean algorithm.value_loss.clip?",
        ),
        ("algorithm.policy_loss={name: gspo, clip_low: 0}", "algorithm.policy_loss.clip_low: expected > 0, found 0"),
        ("algorithm.policy_loss.arguments={a: 1}", "algorithm.policy_loss.arguments: unknown key; did you mean"),
        ("algorithm.kl.estimator=k4", "algorithm.kl.estimator: unknown name 'k4'; expected one of k1, abs, k2, k3, module:f"),
        ("algorithm.kl.arguments={a: 1}", "algorithm.kl: arguments have no effect with estimator 'k1'"),
        ("algorithm.advantage.arguments={a: 1}", "algorithm.advantage: arguments have no effect with estimator 'gae'"),
        ("algorithm.shaping.overlong_buffer=1.5", "overlong_buffer: expected a whole number of tokens, or a share below 1"),
        ("critic={kind: shared, warmup_steps: 1}", "critic: warmup_steps has no effect with kind 'shared'"),
        ("critic={model: {path: m, head_dtype: float32}}", "critic: head_dtype 'float32' of m has no effect"),
        ("reward.model={model: {path: r, head_dtype: float32}}", "reward.model: head_dtype 'float32' of r has no effect"),
        ("train.offload_optimizer=true", "offload_optimizer needs zero_stage 1, 2 or 3"),
        ("preset=trl-clasic", "preset: unknown preset trl-clasic; did you mean trl-classic?"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_and_expectation(minimal, override, message):
    found = message_of(minimal, override)
    assert found.startswith("command line: ")
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mini_batch_size=48", "train.mini_batch_size 48 does not divide the 64 samples of a step"),
        ("placement.policy.ranks=100", "train.mini_batch_size 64 is smaller than placement.policy.ranks 100"),
        ("critic.kind=none", "algorithm.advantage.estimator 'gae' needs a critic"),
        (
            "algorithm.advantage.estimator=grpo",
            "algorithm.advantage.estimator 'grpo' compares responses to one prompt: set rollout",
        ),
        ("rollout.max_model_length=256", "rollout.max_model_length 256 cannot hold a prompt and rollout.max_new_tokens"),
        ("rollout.refill_rounds=2", "rollout.refill_rounds 2 replaces prompts whose responses all score the same"),
        (
            "algorithm.shaping.overlong_buffer=999",
            "algorithm.shaping.overlong_buffer 999 is more than rollout.max_new_tokens 256",
        ),
        ("evaluation.every=5", "evaluation.every 5 needs prompts in data.evaluation"),
        ("algorithm.advantage.estimator=gea", "algorithm.advantage.estimator: unknown name 'gea'; did you mean gae?"),
    ],
)
def test_sections_that_contradict_each_other_are_named(minimal, override, message):
    found = message_of(minimal, override)
    assert found.startswith(f"{minimal}: {message}")
    assert "\n" not in found


def test_a_ranking_of_more_responses_than_letters_is_refused_and_pairs_of_them_are_not(minimal):
    judged = ["rollout.samples_per_prompt=27", "evaluation.enabled=false", "reward.judge.model.path=builtin:tiny"]
    found = message_of(minimal, *judged, "reward.judge.mode=listwise")
    assert "'listwise' shows at most 26 responses at once, found 27: lower rollout.samples_per_prompt" in found
    load_config(PPOConfig, minimal, [*judged, "reward.judge.mode=pairwise"])


def test_the_file_is_named_for_what_the_file_says(minimal):
    minimal.write_text(minimal.read_text() + "train: {epochs: 0, learnign_rate: 1}\n")
    assert message_of(minimal, "run.steps=0").splitlines() == [
        "command line: run.steps: expected >= 1, found 0",
        f"{minimal}: train.epochs: expected >= 1, found 0",
        f"{minimal}: train.learnign_rate: unknown key; did you mean train.learning_rate?",
    ]


def test_many_mistakes_are_cut_to_five_lines(minimal):
    lines = message_of(minimal, "train={a1: 1, a2: 1, a3: 1, a4: 1, a5: 1, a6: 1, a7: 1}").splitlines()
    assert len(lines) == 5
    assert lines[-1] == f"{minimal}: and 3 more"


def test_files_that_cannot_be_read_are_one_line(tmp_path, minimal):
    assert message_of(tmp_path / "runn.yaml") == f"{tmp_path}/runn.yaml: no such file; did you mean {minimal}?"
    assert message_of(tmp_path / "no" / "run.yaml") == f"{tmp_path}/no/run.yaml: no such file"
    assert "cannot be read" in message_of(tmp_path)
    minimal.write_text("- a\n- b\n")
    assert message_of(minimal) == f"{minimal}: expected sections with keys and values, found list"
    minimal.write_text("run: {steps: 1}\nrun: {steps: 2}\n")
    assert message_of(minimal) == f"{minimal}: not valid YAML: key run is given twice at line 2, column 1"
    minimal.write_bytes(b"run: \xff\n")
    assert message_of(minimal).startswith(f"{minimal}: not UTF-8")
    minimal.write_text("")
    assert f"{minimal}: model: required, but not given" in message_of(minimal)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.data())
def test_a_key_with_two_letters_swapped_is_found_again(minimal, key, data):
    section, _, leaf = key.rpartition(".")
    if len(leaf) < 6:
        return
    place = data.draw(st.integers(1, len(leaf) - 3))
    wrong = leaf[:place] + leaf[place + 1] + leaf[place] + leaf[place + 2 :]
    dotted = f"{section}.{wrong}" if section else wrong
    if wrong == leaf:
        return
    # A section that is null by default is made whole here, so that only the unknown key is wrong.
    found = message_of(minimal, f"{dotted}=1")
    assert f"{dotted}: unknown key; did you mean" in found
    assert leaf in found.partition("did you mean")[2]


def test_of_two_keys_as_near_the_one_with_the_same_letters_is_meant(minimal):
    assert "did you mean placement.rollout_cpus" in message_of(minimal, "placement.rollout_pcus=1")
    assert "did you mean placement.rollout_gpus" in message_of(minimal, "placement.rollout_pgus=1")


def test_an_estimator_without_values_starts_no_critic_and_refuses_one(minimal):
    grouped = ["algorithm.advantage.estimator=rloo", "rollout.samples_per_prompt=2"]
    config = load_config(PPOConfig, minimal, grouped)
    assert config.critic.kind == "none"
    written = minimal.with_name("written.yaml")
    written.write_text(dump_config(config))
    assert load_config(PPOConfig, written) == config
    found = message_of(minimal, *grouped, "critic.kind=shared")
    assert found.endswith("algorithm.advantage.estimator 'rloo' does not use a critic: set critic.kind to 'none'")


def test_scores_of_greedy_responses_are_compared_on_one_scale(minimal):
    found = message_of(minimal, "algorithm.advantage.estimator=remax", "algorithm.shaping.scale=true")
    assert "which is the baseline of algorithm.advantage.estimator 'remax'" in found
