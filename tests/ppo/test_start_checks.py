"""Mistakes that `--dry-run` and a run find before Ray starts, each one line."""

import shutil

import pytest
from transformers import AutoTokenizer

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.model_path import model_folder
from rayrlhf.models.skeleton import parameter_count
from rayrlhf.ppo.start_checks import least_bytes
from rayrlhf.ppo.train_ppo import check_ppo
from tests.ppo.runs import run_config

SHALLOW = ["model.path=builtin:tiny?layers=1&hidden=64&context=64", "rollout.backend=transformers"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rayrlhf.actors.connection.ambient_address", lambda: "local")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["placement.policy.cpus=4096"], r"placement: requested \d+\.?\d* CPUs and 0 GPUs \(policy 1 x \(4096 CPU"),
        (
            ["rollout.tensor_parallel_size=2", "rollout.backend=vllm"],
            r"rollout\.tensor_parallel_size 2: builtin:tiny.* has 1 attention heads; expected one of 1$",
        ),
        (["rollout.tensor_parallel_size=2"], r"rollout\.tensor_parallel_size 2 needs rollout\.backend 'vllm'"),
        (
            ["rollout.pipeline_parallel_size=8", "rollout.backend=vllm"],
            r"rollout\.pipeline_parallel_size 8: builtin:tiny.* has \d layers; expected at most \d$",
        ),
        (["placement.policy.gpus=16"], "but the cluster has .* CPUs and .* GPUs"),
        (["model.lora={target_modules: [q_proj, qkv]}"], r"target_modules: no linear layer 'qkv' in .*; it has q_proj, k_proj"),
        (
            ["placement.policy={ranks: 2, sequence_parallel: 2}", "model.attention=eager"],
            r"placement.policy.sequence_parallel 2 with model.attention 'eager': expected 'sdpa'",
        ),
        (
            ["placement.policy={ranks: 2, tensor_parallel: 2}"],
            r"placement.policy.tensor_parallel 2: a llama model .* has 1 heads and 1 key heads; expected a divisor of both$",
        ),
        (
            ["placement.policy={ranks: 2, expert_parallel: 2}"],
            r"placement.policy.expert_parallel 2: a llama model .* has no experts that ranks can share; expected 1$",
        ),
        (
            ["train.router_aux_loss_coefficient=0.01"],
            r"train.router_aux_loss_coefficient 0.01: a llama model .* has no routers with a load-balancing loss in transfor",
        ),
        (
            ["reward.functions=[{name: gsm8k}]"],
            "row 1: reward function 'gsm8k' needs column 'answer'; the row's columns are: prompt, number",
        ),
    ],
)
def test_a_mistake_is_found_without_ray_and_leaves_nothing(tmp_path, settings, message):
    config = run_config(tmp_path, *SHALLOW, *settings)
    with pytest.raises(UserError, match=message) as caught:
        check_ppo(config)
    # One line, or one for each wrong row.
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 or all(": row " in line or line.startswith("These are") for line in lines)
    assert not config.run.root.exists()


def test_a_foreign_run_folder_and_one_of_another_configuration_are_found(tmp_path):
    config = run_config(tmp_path, *SHALLOW)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "thesis.tex").touch()
    with pytest.raises(UserError, match="has files in it but no config"):
        check_ppo(config)


def test_models_beyond_the_memory_are_refused_with_the_smallest_change(tmp_path, monkeypatch):
    config = run_config(tmp_path, *SHALLOW)
    parts = least_bytes(config)
    total = sum(parts.values())
    assert set(parts) == {"policy", "critic", "reference", "rollout"}
    assert parts["policy"] == 16 * parameter_count(config.model)
    monkeypatch.setattr("rayrlhf.ppo.start_checks.memory_limit_bytes", lambda: total)
    check_ppo(config)
    monkeypatch.setattr("rayrlhf.ppo.start_checks.memory_limit_bytes", lambda: total - 1)
    with pytest.raises(UserError, match=r"the models need at least .*; smallest change that fits: critic\.kind=shared$"):
        check_ppo(config)
    monkeypatch.setattr("rayrlhf.ppo.start_checks.memory_limit_bytes", lambda: 1)
    with pytest.raises(UserError, match="no setting makes it fit; choose a smaller model"):
        check_ppo(config)


def test_what_is_right_passes(tmp_path):
    plan = check_ppo(run_config(tmp_path, *SHALLOW, "model.lora={target_modules: [q_proj]}"))
    assert plan.endswith("prompts: 32 to train on, 8 held out")


def test_a_teacher_with_another_tokenizer_is_one_line_before_models_load(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(model_folder(ModelSection(path="builtin:tiny")), folder)
    config = run_config(tmp_path, *SHALLOW, "model.dtype=float32", f"teacher.model.path={folder}")
    plan = check_ppo(config)
    assert f"teacher: {folder}, 1 process, log-ratio x 1, discount 0" in plan
    assert least_bytes(config)["teacher"] == 4 * parameter_count(config.teacher.model)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":', '"~0":').replace('"B":', '"A":').replace('"~0":', '"B":'))
    with pytest.raises(UserError, match=r"its tokenizer has other token ids than .* for 2 of \d+ tokens; expected a teacher"):
        check_ppo(config)


def test_the_memory_check_counts_the_reference_of_a_replica_that_samples_the_opponent(tmp_path):
    own, opponent = (
        least_bytes(run_config(tmp_path, f"preset={preset}", *SHALLOW, "train.mini_batch_size=16"))
        for preset in ("online-dpo", "nash-md")
    )
    assert opponent["rollout"] == 2 * own["rollout"]
    assert opponent["reference"] == own["reference"]


def test_a_role_that_cannot_read_the_policys_samples_is_one_line_before_models_load(tmp_path):
    for settings, message in (
        (
            ["reference.model.path=builtin:tiny?layers=1&hidden=64&context=32"],
            r"^reference\.model\.path .*: it has 32 positions, but prompt and response may have 64 tokens",
        ),
        (
            ["critic.model.path={folder}"],
            r"^critic\.model\.path .*: its tokenizer has other token ids .* for 1 of \d+ tokens; expected a critic with",
        ),
        (["reward.model.model.path=builtin:tiny?layers=1&hidden=64"], r"^reward\.model .*: no scalar head in its files"),
    ):
        folder = tmp_path / "other"
        if not folder.exists():
            shutil.copytree(model_folder(ModelSection(path="builtin:tiny")), folder)
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"A":', '"~A":'))
        given = [setting.format(folder=folder) for setting in settings]
        with pytest.raises(UserError, match=message) as caught:
            check_ppo(run_config(tmp_path, *SHALLOW, *given))
        assert "\n" not in str(caught.value)


def test_a_critic_whose_tokenizer_has_more_tokens_reads_all_of_the_policy(tmp_path):
    folder = tmp_path / "critic"
    shutil.copytree(model_folder(ModelSection(path="builtin:tiny")), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(folder)
    check_ppo(run_config(tmp_path, *SHALLOW, f"critic.model.path={folder}"))
    with pytest.raises(UserError, match=r"for 1 of .* expected a teacher with the same tokenizer"):
        check_ppo(run_config(tmp_path, *SHALLOW, f"teacher.model.path={folder}"))


def test_a_token_that_the_policy_has_no_row_for_is_one_line_before_models_load(tmp_path):
    folder = shutil.copytree(model_folder(ModelSection(path=SHALLOW[0].removeprefix("model.path="))), tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new0|>", "<|new1|>"]})
    tokenizer.save_pretrained(folder)
    template = tmp_path / "new.jinja"
    template.write_text("{% for m in messages %}<|new1|>{{ m['content'] }}<|im_end|>{% endfor %}")
    check_ppo(run_config(tmp_path, *SHALLOW, f"model.path={folder}"))
    with pytest.raises(UserError, match=r"its tokenizer writes '<\|new1\|>' as token \d+, expected at most 258"):
        check_ppo(run_config(tmp_path, *SHALLOW, f"model.path={folder}", f"model.chat_template={template}"))
