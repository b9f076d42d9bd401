"""Evaluation of a run's model on tasks of lm-evaluation-harness.

Log-likelihoods come from the harness's own transformers model, and responses from the run's rollout engine. The harness's vLLM
model looks up the version of a package `vllm`, under which builds for CPUs are not installed.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.factory import check_rollout_backend
from rayrlhf.errors import UserError
from rayrlhf.models.model_path import one_line_reason
from rayrlhf.plugins import did_you_mean
from rayrlhf.ppo.chat import find_model
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

HARNESS = "lm-eval"
"""The only harness, by its name in `--harness`."""
RESULT = "harness.json"
KEPT = ("results", "groups", "versions", "n-shot", "n-samples")
"""Parts of the harness's result that are stored."""


def evaluate_on_tasks(harness: str, run: Path, tasks: Sequence[str], *, check_only: bool = False) -> list[str]:
    """Evaluate a run on tasks, and return the harness's table in lines.

    The scores are also written to `harness.json` in the folder. A run's prompts have its chat template and system prompt, as in
    training; those of a model folder are plain text.

    Args:
        harness: `lm-eval`.
        run: a run folder, or a Hugging Face model folder.
        tasks: names of the harness, or YAML files of tasks.
        check_only: only check them, and return what would be evaluated.

    Raises:
        UserError: the harness is unknown or not installed, a task is unknown, or the folder has no model.
    """
    if harness != HARNESS:
        raise UserError(f"evaluate --harness {harness}: unknown; expected {HARNESS}")
    if not tasks:
        raise UserError("evaluate --harness: no task; expected RUN and names of tasks or YAML files")
    if find_spec("lm_eval") is None:
        raise UserError("evaluate --harness: lm_eval is not installed; pip install 'rayrlhf[harness]'")
    model, rollout, chat, system = _sections(run)
    manager = _known_tasks()
    for task in tasks:
        if task not in manager.task_index and not Path(task).is_file():
            near = did_you_mean(task, manager.all_tasks)
            raise UserError(f"evaluate --harness: no task {task!r}{near}; expected a name of {HARNESS} or a YAML file")
    try:
        manager.load(list(tasks))
    except Exception as error:  # of jinja, datasets and YAML, besides assertions
        raise UserError(f"evaluate --harness: a task cannot be loaded: {one_line_reason(error)}") from error
    if check_only:
        return [f"model: {model.path}", f"tasks: {', '.join(tasks)}"]
    found = _evaluate(model, rollout, tasks, manager, chat=chat, system=system)
    kept = {name: found[name] for name in KEPT if name in found} | {"chat": chat}
    write_atomically(run / RESULT, json.dumps(kept, indent=2) + "\n")
    from lm_eval.utils import make_table

    return [*make_table(found).splitlines(), f"scores: {run / RESULT}"]


@lru_cache(maxsize=1)
def _known_tasks() -> Any:
    """Return the harness's tasks; it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _evaluate(
    model: ModelSection, rollout: RolloutSection, tasks: Sequence[str], manager: Any, *, chat: bool, system: str | None
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from rayrlhf.pipelines.evaluation.harness_model import HarnessModel

    loaded = HarnessModel(model, rollout)
    try:
        found: dict[str, Any] = simple_evaluate(
            loaded,
            tasks=list(tasks),
            task_manager=manager,
            apply_chat_template=chat,
            system_instruction=system,
            log_samples=False,
        )
    finally:
        loaded.close()
    return found


def _sections(run: Path) -> tuple[ModelSection, RolloutSection, bool, str | None]:
    """Return model and rollout settings of a run, whether it chats, and its system prompt."""
    folder, path = find_model(run), run / "config.yaml"
    config = read_note(path) if path.is_file() else {}
    own, data = config.get("model") or {}, config.get("data") or {}
    model = ModelSection(
        path=str(folder), dtype=own.get("dtype", "auto"), trust_remote_code=bool(own.get("trust_remote_code", False))
    )
    rollout = load_config(PPOConfig, path, []).rollout if "critic" in config else RolloutSection()
    check_rollout_backend(rollout)
    chat = bool(config) and data.get("chat", True) is not False
    return model, rollout.model_copy(update={"stop": []}), chat, data.get("system_prompt")
