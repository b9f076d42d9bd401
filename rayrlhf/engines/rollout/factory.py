"""Rollout engine factory.

vLLM is the default backend. The transformers backend runs the same protocol in plain PyTorch, for machines without vLLM and as
the oracle for vLLM in the tests.
"""

from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec


def build_rollout_engine(spec: RolloutSpec) -> RolloutEngine:
    """Start the configured single-turn engine on the model's own weights, in this process.

    `rayrlhf.environments.players.factory.build_player` adds the environment of the spec, if any.

    Raises:
        UserError: the backend is not installed, or it cannot serve this model with these settings.
    """
    if spec.rollout.backend == "vllm":
        from rayrlhf.engines.rollout.vllm import VLLMRolloutEngine

        return VLLMRolloutEngine(spec)
    from rayrlhf.engines.rollout.hf import TransformersRolloutEngine

    return TransformersRolloutEngine(spec)
