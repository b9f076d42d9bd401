"""Small complete SFT, reward-model and DPO runs for tests: the tiny built-in model on real Ray workers."""

import json
import shutil

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.tuning import DPOConfig, RewardTrainingConfig, SFTConfig

SETTINGS = [
    "model.path=builtin:tiny?layers=2&hidden=64&context=128",
    "model.dtype=float32",
    "data.evaluation_share=0.25",
    "data.max_length=128",
    "train.learning_rate=3e-3",
    "train.batch_size=8",
    "train.steps=6",
    "checkpoint.every=2",
    "workers.cpus=1",
    "observe.live=false",
    "observe.tensorboard=false",
]
"""The least that makes a whole run; what is given later wins."""


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_config(folder, *overrides, rows=48):
    path = write_rows(
        folder / "texts.jsonl",
        [
            {"prompt": f"say {number} twice", "completion": f"{number} {number}" + " and" * (number % 5)}
            for number in range(rows)
        ],
    )
    own = [f"data.train.path={path}", f"run.root={folder / 'runs'}", "evaluation.generations=2", "evaluation.max_new_tokens=4"]
    return load_config(SFTConfig, None, [*SETTINGS, *own, *overrides])


def reward_config(folder, *overrides, rows=96, learnable=True):
    """Pairs where the better answer says yes; or where nothing tells the better one."""
    words = [("yes", "no"), ("yes", "no") if learnable else ("no", "yes")]
    path = write_rows(
        folder / "pairs.jsonl",
        [
            {"prompt": f"is it {number}?", "chosen": words[number % 2][0], "rejected": words[number % 2][1]}
            for number in range(rows)
        ],
    )
    own = [f"data.train.path={path}", f"run.root={folder / 'runs'}"]
    return load_config(RewardTrainingConfig, None, [*SETTINGS, *own, *overrides])


def copied(config, folder):
    """The configuration of a copy of a finished run in another folder."""
    shutil.copytree(config.run.folder, folder / config.run.name)
    return config.model_copy(update={"run": config.run.model_copy(update={"root": folder})})


def dpo_config(folder, *overrides):
    """Pairs where the better answer says yes and is a little longer."""
    rows = [{"prompt": f"is it {number}?", "chosen": "yes, it is", "rejected": "no"} for number in range(48)]
    path = write_rows(folder / "pairs.jsonl", rows)
    own = [f"data.train.path={path}", f"run.root={folder / 'runs'}"]
    return load_config(DPOConfig, None, [*SETTINGS, *own, *overrides])
