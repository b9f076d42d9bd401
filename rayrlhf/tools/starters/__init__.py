"""Starter configurations: one small commented YAML per task, and JSON schemas."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rayrlhf.config.loading.kinds import config_class
from rayrlhf.config.loading.presets import PRESETS, preset_tree
from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically

MODEL = "builtin:smollm2-135m-instruct"


def starter(task: str, model: str = MODEL, *, gpus: int = 0, preset: str | None = None) -> str:
    """Return a first configuration of a task as YAML with comments.

    Args:
        task: one of `rayrlhf.config.loading.kinds.ROOTS`.
        model: path of the initial model.
        gpus: number of GPUs of this machine; steps are larger with any.
        preset: algorithm of the task `ppo`, written as the `preset:` key.

    Raises:
        UserError: an unknown task or preset.
    """
    config_class(task)
    if preset is not None and task != "ppo":
        raise UserError(f"--preset {preset}: only the task ppo has presets; found the task {task}")
    text = (files(__package__) / f"{task if preset is None else 'ppo-preset'}.yaml").read_text(encoding="utf-8")
    if preset is not None:
        tree = preset_tree(preset, "--preset")
        samples = tree["rollout"]["samples_per_prompt"]
        teacher = "teacher:\n  model: {path: MODEL}              # a larger model with the same tokenizer\n"
        text = text.replace("data:\n", f"{teacher}data:\n", 1) if "teacher" in tree else text
        text = (
            text.replace("my-PRESET", f"my-{preset.replace('+', '-')}")
            .replace("PRESET", preset)
            .replace("GROUP", str(samples if gpus else min(samples, 4)))
        )
    return text.replace("path: MODEL", f"path: {json.dumps(model)}").replace("PROMPTS", str(128 if gpus else 16))


def visible_gpus() -> int:
    """Return the number of GPUs of this machine, without importing torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def write_starter(task: str, path: Path, model: str = MODEL, *, gpus: int = 0, preset: str | None = None) -> None:
    """Write a first configuration.

    Raises:
        UserError: an unknown task, or the file exists.
    """
    write_text(path, starter(task, model, gpus=gpus, preset=preset))


def write_text(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        UserError: the file exists.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; choose another file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def json_schema(task: str) -> dict[str, Any]:
    """Return the JSON schema of a task's configuration: types, defaults, bounds, descriptions.

    Raises:
        UserError: an unknown task.
    """
    schema = config_class(task).model_json_schema()
    if task == "ppo":
        preset = {"enum": list(PRESETS), "description": "Recipe of an algorithm, under all keys of the file."}
        schema["properties"]["preset"] = preset
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"rayrlhf {task}"}
