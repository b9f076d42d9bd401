"""Configurations of TRL's trainers as YAML, with a comment for each field without an equivalent."""

import ast
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rayrlhf.config.loading.yaml_text import dump, parse
from rayrlhf.errors import UserError
from rayrlhf.tools.starters import MODEL, starter
from rayrlhf.tools.starters.trl_fields import CONVERTED, DEFAULTS, KEYS, REASONS, SIGNS, TASKS

Fields = Mapping[str, Any]
_AGGREGATIONS = {
    "grpo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "dr_grpo": "constant",
    "cispo": "token",
    "sapo": "sequence",
}
"""`loss_type` of GRPO -> `loss_aggregation`."""
_KL_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2"}
_DPO_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down")


def starter_from_trl(source: str, task: str | None, model: str | None) -> tuple[str, str]:
    """Return the task and its YAML for a configuration of TRL.

    Args:
        source: a call such as `GRPOConfig(beta=0.04)`, or a Python file with one; JSON or keyword arguments, or a JSON file.
        task: needed for JSON and keyword arguments, which do not name the class.
        model: path of the initial model. None takes that of the configuration, or a built-in.

    Raises:
        UserError: no configuration in the source, or several, or one of another task.
    """
    named, fields, unread = _read(source)
    known = _class_of(named, fields, task)
    own = TASKS[known]
    tree = parse(starter(own, model or MODEL, gpus=1))
    tree = {name: tree[name] for name in ("model", "data", "reward") if name in tree} | {"run": {"name": f"from-trl-{own}"}}
    comments = _fill(tree, known, {**DEFAULTS[known], **fields})
    if model is not None:
        tree["model"]["path"] = model
    for field in fields:
        if field in CONVERTED[known] or field in KEYS[known]:
            continue
        if field in REASONS:
            comments.append(f"{field}: {REASONS[field]}")
        else:
            comments.append(f"{field}: no equivalent (found {fields[field]!r})")
    comments += [f"{field}: not a plain value; set its key by hand" for field in unread]
    head = [
        f"From TRL's {named or known}: rayrlhf {own} FILE (--dry-run checks it first). Every key: rayrlhf schema {own}",
        "model.path, data and reward are examples where the configuration of TRL has none.",
        *comments,
    ]
    return own, "".join(f"# {' '.join(line.split())}\n" for line in head) + dump(tree)


def _read(source: str) -> tuple[str | None, Fields, list[str]]:
    """Return class name or None, fields, and names of fields without a literal."""
    is_file = source.endswith((".py", ".json"))
    try:
        text = Path(source).read_text(encoding="utf-8") if is_file else source
        if text.lstrip().startswith("{"):
            return None, json.loads(text), []
        module = ast.parse(text if is_file or "Config(" in text else f"dict({text})")
    except OSError as error:
        raise UserError(f"--from-trl {source}: {error.strerror}") from error
    except (json.JSONDecodeError, SyntaxError) as error:
        raise UserError(f"--from-trl: neither JSON nor Python: {error}") from error
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and _name(node) in (*TASKS, "dict")]
    if "Config(" in text or is_file:
        calls = [call for call in calls if _name(call) in TASKS]
    if len(calls) != 1:
        names = ", ".join(name for name in TASKS if name != "ClassicPPOConfig")
        raise UserError(f"--from-trl: found {len(calls)} configurations; expected one of {names}, JSON or keyword arguments")
    fields, unread = {}, []
    for keyword in calls[0].keywords:
        try:
            fields[keyword.arg or "**"] = ast.literal_eval(keyword.value)
        except ValueError:
            unread.append(keyword.arg or f"**{ast.unparse(keyword.value)}")
    name = _name(calls[0])
    return None if name == "dict" else name, fields, unread


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _class_of(named: str | None, fields: Fields, task: str | None) -> str:
    """Return the class, the form of `PPOConfig` by its fields."""
    if named is None and task is None:
        raise UserError("--from-trl: JSON and keyword arguments do not name the class; expected a TASK, or GRPOConfig(...)")
    if named is not None and task not in (None, TASKS[named]):
        raise UserError(f"--from-trl: {named} is a configuration of the task {TASKS[named]}, found the task {task}")
    if named == "PPOConfig" or (named is None and task == "ppo"):
        found = next((name for name, signs in SIGNS.items() if signs & fields.keys()), None)
        return found or named or "GRPOConfig"
    known = named or next((name for name, own in TASKS.items() if own == task), None)
    if known is None:
        raise UserError(f"--from-trl: TRL has no configuration of the task {task}; expected ppo, sft, reward or dpo")
    return known


def _fill(tree: dict[str, Any], known: str, fields: Fields) -> list[str]:
    """Write the fields' values into a tree; returns comments."""
    for field, key in KEYS[known].items():
        if fields.get(field) is not None:
            _put(tree, key, fields[field])
    convert: dict[str, Callable[[dict[str, Any], Fields], list[str]]] = {
        "ClassicPPOConfig": _fill_classic,
        "PPOConfig": _fill_modern,
        "GRPOConfig": _fill_grpo,
    }
    return convert.get(known, _fill_tuning)(tree, fields) + _fill_common(tree, fields)


def _put(tree: dict[str, Any], dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def _fill_common(tree: dict[str, Any], fields: Fields) -> list[str]:
    comments = []
    if "adam_beta1" in fields or "adam_beta2" in fields or "lr_scheduler_type" in fields:
        _put(tree, "train.optimizer.betas", [fields.get("adam_beta1", 0.9), fields.get("adam_beta2", 0.999)])
    shape = str(fields.get("lr_scheduler_type", "")).removesuffix("_with_warmup")
    if shape in ("constant", "linear", "cosine"):
        _put(tree, "train.schedule.shape", shape)
    elif shape:
        comments.append(f"lr_scheduler_type: no equivalent of {shape}; train.schedule.shape is constant, linear or cosine")
    if isinstance(fields.get("warmup_steps"), float) and fields["warmup_steps"] < 1:
        del tree["train"]["schedule"]["warmup_steps"]
        comments.append("warmup_steps: a share of the steps; train.schedule.warmup_steps is a number of steps")
    if fields.get("bf16") is not None:
        _put(tree, "model.dtype", "bfloat16" if fields["bf16"] else "float32")
    if fields.get("fp16"):
        comments.append("fp16: no equivalent; model.dtype is float32 or bfloat16")
    if fields.get("output_dir"):
        folder = Path(fields["output_dir"])
        tree["run"] |= {"root": str(folder.parent)} | ({} if fields.get("run_name") else {"name": folder.name})
    return comments


def _fill_classic(tree: dict[str, Any], fields: Fields) -> list[str]:
    comments: list[str] = []
    _preset(tree, "trl-classic", fields)
    batch, micro = fields.get("batch_size", 128), fields.get("mini_batch_size", 128)
    _put(tree, "run.steps", math.ceil(fields.get("steps", 20000) / batch))
    _put(tree, "train.mini_batch_size", min(batch, micro * fields.get("gradient_accumulation_steps", 1)))
    _put(tree, "train.micro_batch_size", micro)
    _put(tree, "algorithm.kl.target", fields.get("target", 6) if fields.get("adap_kl_ctrl", True) else None)
    _put(tree, "train.early_stop_kl", fields.get("target_kl", 1) if fields.get("early_stopping") else None)
    penalty = fields.get("kl_penalty", "kl")
    if penalty in _KL_ESTIMATORS:
        _put(tree, "algorithm.kl.estimator", _KL_ESTIMATORS[penalty])
    else:
        comments.append(f"kl_penalty: no equivalent of {penalty}")
    return comments


def _fill_modern(tree: dict[str, Any], fields: Fields) -> list[str]:
    comments: list[str] = []
    _preset(tree, "trl-modern", fields)
    micro = fields["per_device_train_batch_size"]
    batch = micro * fields["gradient_accumulation_steps"]
    tree["rollout"] = tree.get("rollout", {}) | {"prompts_per_step": batch}
    _put(tree, "train.mini_batch_size", batch)
    _put(tree, "train.micro_batch_size", micro)
    if fields.get("reward_model_path"):
        del tree["reward"]["functions"]
    if fields.get("num_mini_batches", 1) > 1:
        comments.append("num_mini_batches: only reshuffled in TRL; train.mini_batch_size is the size of an optimizer step")
    return comments + _length(tree, math.ceil(fields["total_episodes"] / batch) if fields.get("total_episodes") else None)


def _preset(tree: dict[str, Any], name: str, fields: Fields) -> None:
    tree["preset"] = name
    if fields.get("cliprange") is not None:
        for side in ("low", "high"):
            _put(tree, f"algorithm.policy_loss.clip_{side}", fields["cliprange"])


def _length(tree: dict[str, Any], steps: int | None) -> list[str]:
    _put(tree, "run.steps", steps or 100)
    return [] if steps else ["run.steps is an example: set it to epochs x prompts / rollout.prompts_per_step"]


def _fill_grpo(tree: dict[str, Any], fields: Fields) -> list[str]:
    micro = fields["per_device_train_batch_size"]
    mini = micro * fields["gradient_accumulation_steps"]
    generated = fields.get("generation_batch_size") or micro * (
        fields.get("steps_per_generation") or fields["gradient_accumulation_steps"]
    )
    prompts = max(1, generated // fields["num_generations"])
    _put(tree, "rollout.prompts_per_step", prompts)
    _put(tree, "train.mini_batch_size", mini)
    _put(tree, "train.micro_batch_size", micro)
    _put(tree, "critic.kind", "none")
    _put(tree, "algorithm.kl", {"coefficient": fields["beta"], "estimator": "k3", "placement": "loss"})
    if fields.get("mask_truncated_completions"):
        _put(tree, "algorithm.shaping.truncated", "mask")
    scale = fields["scale_rewards"]
    centered = scale in ("none", False)
    _put(tree, "algorithm.advantage", {"estimator": "dr_grpo" if centered else "grpo", "whiten": False})
    comments = (
        ["scale_rewards: no equivalent of batch; the standard deviation is that of the group"] if scale == "batch" else []
    )
    comments += _fill_loss(tree, fields)
    comments.append(
        "batch sizes are those of one device: multiply rollout.prompts_per_step and train.mini_batch_size by others"
    )
    updates = max(1, generated // mini) * fields["num_iterations"]
    return comments + _length(tree, math.ceil(fields["max_steps"] / updates) if fields.get("max_steps", -1) > 0 else None)


def _fill_loss(tree: dict[str, Any], fields: Fields) -> list[str]:
    kind, low = fields["loss_type"], fields["epsilon"]
    high = low if fields.get("epsilon_high") is None else fields["epsilon_high"]
    loss = tree["algorithm"].setdefault("policy_loss", {})
    loss["loss_aggregation"] = _AGGREGATIONS.get(kind, "token")
    if kind == "cispo":
        loss |= {"name": "cispo"} | ({"clip_high": high - 1} if high > 1 else {})  # TRL's is the bound itself
        loss.pop("dual_clip", None)
    elif kind == "sapo":
        temperatures = {"temperature_positive": "sapo_temperature_pos", "temperature_negative": "sapo_temperature_neg"}
        loss |= {"name": "sapo"} | {key: fields[field] for key, field in temperatures.items() if field in fields}
        loss.pop("dual_clip", None)
    else:
        name = "gspo" if fields.get("importance_sampling_level") == "sequence" else "ppo"
        loss |= {"name": name, "clip_low": low, "clip_high": high}
    return [] if kind in _AGGREGATIONS else [f"loss_type: no equivalent of {kind}; expected {', '.join(_AGGREGATIONS)}"]


def _fill_tuning(tree: dict[str, Any], fields: Fields) -> list[str]:
    micro = fields["per_device_train_batch_size"]
    _put(tree, "train.batch_size", micro * fields["gradient_accumulation_steps"])
    if not fields.get("packing"):
        _put(tree, "train.micro_batch_size", micro)
    if fields.get("max_steps", -1) > 0:
        _put(tree, "train.steps", fields["max_steps"])
    else:
        _put(tree, "train.epochs", math.ceil(fields["num_train_epochs"]))
    kinds = fields.get("loss_type")
    kind = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds
    dpo = "beta" in fields
    if dpo and kind in _DPO_LOSSES:
        _put(tree, "train.loss", kind)
    expected = _DPO_LOSSES if dpo else ("nll",)
    return [] if kind in (None, *expected) else [f"loss_type: no equivalent of {kind}; expected {', '.join(expected)}"]
