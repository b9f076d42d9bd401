"""Kinds of configuration files by command, and detection of the wrong one."""

from importlib import import_module
from typing import Any

from rayrlhf.config.loading.problems import known_keys
from rayrlhf.config.section import Section
from rayrlhf.errors import UserError

ROOTS = {
    "ppo": "rayrlhf.config.ppo:PPOConfig",
    "sft": "rayrlhf.config.tuning:SFTConfig",
    "reward": "rayrlhf.config.tuning:RewardTrainingConfig",
    "dpo": "rayrlhf.config.tuning:DPOConfig",
    "presft": "rayrlhf.config.pipelines:PreSFTConfig",
    "evaluate": "rayrlhf.config.pipelines:EvaluateConfig",
    "icl-build": "rayrlhf.config.icl:ICLBuildConfig",
    "icl-pack": "rayrlhf.config.icl:ICLPackConfig",
    "icl-evaluate": "rayrlhf.config.icl:ICLEvaluateConfig",
    "icl-distill": "rayrlhf.config.icl:ICLDistillConfig",
}
"""Task -> the class of its configuration."""
_MIN_UNKNOWN = 2
"""Unknown keys that make a file one of another kind; a single one is a mistake in it."""


def config_class(task: str) -> type[Section]:
    """Return the class of a task's configuration.

    Raises:
        UserError: an unknown task.
    """
    if task not in ROOTS:
        raise UserError(f"{task}: expected one of {', '.join(ROOTS)}")
    module, name = ROOTS[task].split(":")
    found: type[Section] = getattr(import_module(module), name)
    return found


def check_kind(given: type[Section], tree: dict[str, Any], file: str) -> None:
    """Check by its keys that an invalid file is not of another command.

    Raises:
        UserError: names the command.
    """
    tasks = {config_class(task): task for task in ROOTS}
    if given not in tasks or len(_unknown(given, tree)) < _MIN_UNKNOWN:
        return
    for other, task in tasks.items():
        required = {field.alias or name for name, field in other.model_fields.items() if field.is_required()}
        if required <= tree.keys() and not _unknown(other, tree):
            command, own = (f"rayrlhf {name.replace('-', ' ')}" for name in (task, tasks[given]))
            raise UserError(f"{file}: a configuration of `{command}`, not of `{own}`: its sections are those of {task}")


def _unknown(root: type[Section], tree: dict[str, Any]) -> set[str]:
    """Return sections and keys of sections that a kind of file does not have."""
    keys = {f"{section}.{key}" for section, value in tree.items() if isinstance(value, dict) for key in value}
    return (keys | tree.keys()) - set(known_keys(root, tree=tree))
