"""The whole road by commands: raw preferences, SFT, reward model, PPO, stopped, resumed, report, export, vLLM, evaluation."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.models.plain_readers import greedy_answers

ROOT = Path(__file__).parents[1]
MODEL = "builtin:tiny?layers=2&hidden=64&context=128"
HEAD = {"model": {"path": MODEL, "dtype": "float32"}, "checkpoint": {"every": 0}}
TUNING = {"train": {"steps": 30, "batch_size": 8, "learning_rate": 3e-3}, "workers": {"cpus": 1}}
ROWS = {"path": "hh.jsonl.gz"}
LENGTH = {"evaluation_share": 0.25, "max_length": 96}
RUNS = {
    "sft": HEAD | TUNING | {"data": {"train": ROWS} | LENGTH, "evaluation": {"generations": 2, "max_new_tokens": 4}},
    "reward": HEAD | TUNING | {"data": {"train": ROWS} | LENGTH},
    "ppo": {
        "model": {"path": "runs/sft", "dtype": "float32"},
        "critic": {"kind": "shared"},
        "reward": {"model": {"model": {"path": "runs/reward", "dtype": "float32"}}},
        "data": {"train": ROWS, "evaluation": {"path": "test.csv", "prompt_field": "Frage"}},
        "rollout": {"backend": "transformers", "prompts_per_step": 16, "max_new_tokens": 8},
        "train": {"mini_batch_size": 8, "learning_rate": 1e-3},
        "checkpoint": {"every": 0},
        "evaluation": {"prompts": 8},
    },
    "evaluate": {
        "model": {"path": "runs/ppo", "dtype": "float32"},
        "data": {"path": "test.csv", "prompt_field": "Frage"},
        "reward": {"functions": [{"name": "exact.py:exact"}]},
        "rollout": {"backend": "transformers", "max_new_tokens": 8},
    },
}
EXACT = "def exact(responses, *, Loesung, **columns):\n    return [float(a.strip() == b) for a, b in zip(responses, Loesung)]\n"
UNREADABLE = re.compile(
    r"Traceback|Warning\b|\bmirror|\bbeat\b|nats a response|\bs a response|less KL penalty|\bspread\b|by lot|take turns"
    r"|bundles|PACK\b",
)
"""Words that people could not read in messages, and signs of libraries on the terminal."""


class User:
    """Somebody at a terminal, in a folder of their own."""

    def __init__(self, folder):
        self.folder, self.said = folder, []

    def start(self, *words):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [str(Path(sys.executable).with_name("rayrlhf")), *words]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )

    def run(self, *words, code=0):
        began = time.monotonic()
        process = self.start(*words)
        try:
            said, _ = process.communicate(timeout=240)
        finally:
            process.kill()
        self.keep(words, said, f"{time.monotonic() - began:.0f} s")
        assert process.returncode == code, said
        return said

    def keep(self, words, said, seconds):
        self.said.append(said)
        print(f"$ rayrlhf {' '.join(words)}    # {seconds}\n{said}")


@pytest.fixture
def user(tmp_path):
    rows = [
        {
            "chosen": f"\n\nHuman: Hello\n\nAssistant: hi\n\nHuman: Is it {number}?\n\nAssistant: yes",
            "rejected": f"\n\nHuman: Hello\n\nAssistant: hi\n\nHuman: Is it {number}?\n\nAssistant: no",
        }
        for number in range(60)
    ]
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ["Frage,Loesung", *(f"Is it {number}?,yes" for number in range(60, 68))]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "exact.py").write_text(EXACT)
    for name, tree in RUNS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"run": {"name": name}} | tree))
    return User(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_raw_preferences_become_a_served_model_without_a_stumble(user):
    user.run("sft", "sft.yaml", "data.train.messages_field=chosen")
    user.run("reward", "reward.yaml", "--from", "runs/sft")
    prompts = "data.train.prompt_field=chosen"
    said = user.run("ppo", "ppo.yaml", prompts, "run.steps=2")
    assert "finished: 2 steps" in said
    assert "held-out score: " in said

    words = ("ppo", "ppo.yaml", prompts, "run.steps=500")
    process = user.start(*words)
    metrics = user.folder / "runs/ppo/metrics.jsonl"
    while not re.search(r'"step": ?4\b', metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    user.keep(words, said, "stopped")
    assert process.returncode == 75, said
    done = int(re.search(r"stopped after step (\d+) on SIGTERM; the same command resumes", said)[1])
    assert f"finished: {done + 1} steps" in user.run("ppo", "ppo.yaml", prompts, f"run.steps={done + 1}")

    user.run("report", "runs/ppo")
    assert (user.folder / "runs/ppo/report.html").is_file()
    export = Path(user.run("export", "runs/ppo").strip().splitlines()[-1])
    (texts,) = greedy_answers([user.folder / export], "Is it 3?")
    assert len(set(texts)) == 1, texts
    user.run("evaluate", "evaluate.yaml")
    assert json.loads((user.folder / "runs/evaluate/evaluation.json").read_text())["prompts"] == 8
    assert [found for text in user.said for found in UNREADABLE.findall(text)] == []
