"""Rollout engine factory.

vLLM is the default backend. The transformers backend runs the same protocol in plain PyTorch, for machines without vLLM and as
the oracle for vLLM in the tests. A user's own class is built as `Class(spec, **rollout.arguments)`.
"""

import importlib.util
import inspect
from collections.abc import Callable

from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.errors import UserError
from rayrlhf.plugins import Registry, bind_arguments, check_methods

METHODS = (
    "submit", "poll", "cancel", "unfinished", "sleep", "begin_weights", "receive_weights", "finish_weights", "close",
)  # fmt: skip
"""Members that a class needs to be a rollout engine; `version` is an attribute of its instances."""

ROLLOUT_ENGINES: Registry[Callable[..., RolloutEngine]] = Registry(
    "rollout.backend",
    {
        "vllm": "rayrlhf.engines.rollout.vllm:VLLMRolloutEngine",
        "transformers": "rayrlhf.engines.rollout.hf:TransformersRolloutEngine",
    },
    "class",
    inspect.isclass,
)


def build_rollout_engine(spec: RolloutSpec) -> RolloutEngine:
    """Start the configured single-turn engine on the model's own weights, in this process.

    `rayrlhf.environments.players.factory.build_player` adds the environment of the spec, if any.

    Raises:
        UserError: see `check_rollout_backend`; also settings with which the backend cannot serve this model.
    """
    return check_rollout_backend(spec.rollout)(spec)


def check_rollout_backend(rollout: RolloutSection, key: str = "rollout.backend") -> Callable[[RolloutSpec], RolloutEngine]:
    """Return a backend's class with its arguments bound; messages name the setting `key`.

    Raises:
        UserError: the backend is not installed or cannot be resolved, it lacks a method, the arguments do not fit it,
            or it does not span several devices.
    """
    if rollout.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{key}: vllm is not installed; pip install 'rayrlhf[cpu]' ('rayrlhf[gpu]' on GPUs), or set {key}=transformers"
        )
    for size in ("tensor_parallel_size", "pipeline_parallel_size"):
        refused = rollout.backend == "transformers" or (rollout.backend != "vllm" and size == "pipeline_parallel_size")
        if refused and getattr(rollout, size) > 1:
            found = f"{key.removesuffix('backend')}{size} {getattr(rollout, size)}"
            raise UserError(f"{found} needs {key} 'vllm', found {rollout.backend!r}; expected 1")
    where = f"{key} {rollout.backend!r}"
    engine = ROLLOUT_ENGINES.resolve(rollout.backend, key)
    check_methods(where, engine, METHODS)
    return bind_arguments(where, engine, rollout.arguments, positional=1)
