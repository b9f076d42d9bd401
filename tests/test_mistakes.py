"""A user's mistakes: each ends a real run with exit code 2 and one line, before Ray starts, within seconds."""

import json
import os
import re
import sys
import time

import pytest
import ray
import yaml

from rayrlhf import cli

SECONDS = 15.0
PPO = {
    "run": {"name": "mine", "steps": 2, "root": "runs"},
    "model": {"path": "builtin:tiny?layers=1&hidden=64&context=64", "dtype": "float32"},
    "critic": {"kind": "shared"},
    "data": {"train": {"path": "prompts.jsonl"}},
    "reward": {"functions": [{"name": "mine.py:good"}]},
    "rollout": {"backend": "transformers", "prompts_per_step": 8, "max_new_tokens": 8, "max_model_length": 64},
    "train": {"mini_batch_size": 8},
}
TUNING = {"run": {"name": "mine", "root": "runs"}, "model": PPO["model"]} | {
    "data": {"train": {"path": "rows.jsonl"}, "max_length": 64}
}
TUNED = ("sft", "reward", "dpo")
FUNCTIONS = """
def good(responses): return [0.0 for _ in responses]
def raising(responses): return [1 / 0]
def short(responses): return [0.0]
def words(responses): return ["good" for _ in responses]
def nan(responses): return [float("nan") for _ in responses]
def column(responses, answer): return [0.0 for _ in responses]
"""
MISTAKES = {
    "a misspelled key": ("ppo", ["train.learning_rat=1e-5"], r"train\.learning_rat: unknown key; did you mean .*learning_rate"),
    "a word for a number": ("ppo", ["run.steps=many"], r'run\.steps: expected a whole number, found "many"'),
    "a number out of range": ("ppo", ["rollout.temperature=0"], r"rollout\.temperature: expected > 0, found 0"),
    "an unknown preset": ("ppo", ["preset=grop"], r"preset.*grpo"),
    "an override without a value": ("ppo", ["run.steps"], r"run\.steps: expected section\.key=value"),
    "TRL's name of a key": ("ppo", ["train.per_device_train_batch_size=8"], r"per_device_train_batch_size: unknown key"),
    "TRL's name at the top": ("ppo", ["num_generations=8"], r"num_generations: unknown key"),
    "peft's name of LoRA's modules": ("ppo", ["model.lora={targets: [q_proj]}"], r"targets: unknown key; .*target_modules"),
    "modules that the model lacks": (
        "ppo",
        ["model.lora={target_modules: [qkv]}"],
        r"no linear layer 'qkv' in .*; it has q_proj",
    ),
    "64 CPUs on a smaller machine": ("ppo", ["placement.policy.cpus=4096"], r"requested .* CPUs .* but the cluster has"),
    "a GPU that is absent": ("ppo", ["placement.policy.gpus=64"], r"requested .* GPUs .* but the cluster has"),
    "a mini-batch that does not divide": ("ppo", ["train.mini_batch_size=3"], r"mini_batch_size.*does not divide"),
    "a group of one": ("ppo", ["preset=grpo", "critic={kind: none}", "rollout.samples_per_prompt=1"], r"samples_per_prompt"),
    "a response longer than the context": ("ppo", ["rollout.max_new_tokens=64"], r"max_new_tokens|leave no room"),
    "eos as a stop text": ("ppo", ["rollout.stop=[eos]"], r"rollout\.stop"),
    "a missing data file": ("ppo", ["data.train.path=prompt.jsonl"], r"prompt\.jsonl.*cannot load it|did you mean"),
    "data without a prompt": ("ppo", ["data.train.path=answers.jsonl"], r"answers\.jsonl.*prompt"),
    "an unset variable": ("ppo", ["data.train.path=$NO_SUCH/prompts.jsonl"], r"environment variable \$NO_SUCH is not set"),
    "a missing model folder": ("ppo", ["model.path=./none"], r"model\.path './none': no such folder"),
    "a hub name that does not exist": ("ppo", ["model.path=someone/none"], r"model\.path 'someone/none'"),
    "a run without a model": ("ppo", ["model.path=runs/unfinished"], r"this run has no model in export/ yet"),
    "an unknown built-in model": ("ppo", ["model.path=builtin:tyny"], r"unknown built-in model; did you mean builtin:tiny"),
    "an unknown reward": ("ppo", ["reward.functions=[{name: gsm9k}]"], r"'gsm9k' is not registered; did you mean 'gsm8k'"),
    "a missing reward file": ("ppo", ["reward.functions=[{name: 'my.py:good'}]"], r"my\.py: no such file"),
    "a missing reward function": (
        "ppo",
        ["reward.functions=[{name: 'mine.py:god'}]"],
        r"no function 'god'; did you mean 'good'",
    ),
    "a reward that raises": ("ppo", ["reward.functions=[{name: 'mine.py:raising'}]"], r"raised ZeroDivisionError.*mine\.py:3"),
    "a reward of too few numbers": ("ppo", ["reward.functions=[{name: 'mine.py:short'}]"], r"'short' returned 1 .*2"),
    "a reward of words": ("ppo", ["reward.functions=[{name: 'mine.py:words'}]"], r"'words'.*'good'.*expected a finite number"),
    "a reward of NaN": ("ppo", ["reward.functions=[{name: 'mine.py:nan'}]"], r"'nan'.*nan.*expected a finite number"),
    "a column that is not there": ("ppo", ["reward.functions=[{name: 'mine.py:column'}]"], r"needs column 'answer'"),
    "a foreign run folder": ("ppo", ["run.name=foreign"], r"has files in it but no config\.yaml"),
    "a folder that cannot be": ("ppo", ["run.root=prompts.jsonl"], r"prompts\.jsonl"),
    "another run's folder": ("ppo", ["run.name=taken", "run.seed=7"], r"another configuration \(run\.seed: 0 -> 7\)"),
    "weights of a folder without a run": ("ppo", ["--from", "runs/foreign"], r"--from runs/foreign: not a run folder"),
    "weights of an unfinished run": ("sft", ["--from", "runs/unfinished"], r"this run has no model in export/ yet"),
    "models beyond the memory": ("ppo", ["model.path=builtin:tiny"], r"the models need at least .* this machine has"),
    "a PPO file given to sft": ("sft", ["@ppo.yaml"], r"a configuration of `rayrlhf ppo`, not of `rayrlhf sft`"),
    "a missing configuration": ("sft", ["@sf.yaml"], r"sf\.yaml: no such file; did you mean sft\.yaml"),
    "broken YAML": ("sft", ["@broken.yaml"], r"broken\.yaml: not valid YAML.*line 1"),
    "SFT on preferences without answers": ("sft", ["data.train.path=prompts.jsonl"], r"expected the columns"),
    "a reward model without pairs": ("reward", ["data.train.path=answers.jsonl"], r"expected the columns"),
    "64 workers": ("dpo", ["workers.cpus=4096", "data.train.path=pairs.jsonl"], r"workers: 1 x 4096 cpus requested"),
}


@pytest.fixture
def user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rayrlhf.actors.connection.ambient_address", lambda: "local")
    monkeypatch.setattr(ray, "init", lambda *args, **named: pytest.fail("Ray starts"))
    rows = {
        "prompts": {"prompt": "say 1"},
        "answers": {"reply": "1"},
        "rows": {"prompt": "say 1", "completion": "1"},
        "pairs": {"prompt": "say 1", "chosen": "1", "rejected": "2"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 32)
    for name, tree in {"ppo": PPO, **dict.fromkeys(TUNED, TUNING)}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.yaml").write_text("run: [")
    for name in ("foreign", "unfinished", "taken"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/foreign/thesis.tex").touch()
    (tmp_path / "runs/unfinished/config.yaml").touch()
    taken = PPO | {"run": PPO["run"] | {"name": "taken"}}
    (tmp_path / "runs/taken/config.yaml").write_text(yaml.safe_dump(taken))
    (tmp_path / "runs/taken/metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
def test_a_mistake_is_one_line_before_ray_starts(user, mistake, dry_run, monkeypatch, capsys):
    command, given, message = MISTAKES[mistake]
    file = given[0].removeprefix("@") if given[0].startswith("@") else f"{command}.yaml"
    if mistake == "models beyond the memory":
        monkeypatch.setattr("rayrlhf.ppo.start_checks.memory_limit_bytes", lambda: 2**20)
    overrides = [one for one in given if not one.startswith("@")]
    monkeypatch.setattr(sys, "argv", ["rayrlhf", command, file, *overrides, *(["--dry-run"] if dry_run else [])])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = sorted(path.name for path in (user / "runs").iterdir())
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert time.monotonic() - began < SECONDS
    error = capsys.readouterr().err
    assert end.value.code == 2
    lines = error.strip().splitlines()
    assert lines[0].startswith("rayrlhf: ")
    assert "Traceback" not in error
    assert sorted(path.name for path in (user / "runs").iterdir()) == before, "nothing is left behind"
    assert re.search(message, error), error


def test_a_run_begins_with_the_weights_of_another(user, monkeypatch):
    found = []
    for command, check in (("ppo", "ppo.train_ppo.check_ppo"), *((one, f"tuning.train_model.check_{one}") for one in TUNED)):
        monkeypatch.setattr(f"rayrlhf.{check}", lambda config: found.append(config.model.path) or "plan")
        monkeypatch.setattr(sys, "argv", ["rayrlhf", command, f"{command}.yaml", "--from", "runs/taken", "--dry-run"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
    assert found == [str(user / "runs/taken")] * 4
