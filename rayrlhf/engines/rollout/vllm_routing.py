"""Experts that vLLM chooses, by token of each request.

On CPUs a hook of vLLM's routers sees them, and the rows of a step are assigned to requests in the runner's order. On GPUs it is
vLLM's own `enable_return_routed_experts`, which has not been run. Tokens from the prefix cache are not computed, so their
experts are unknown.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayrlhf.data.expert_ids import ExpertIds, compact
from rayrlhf.errors import UserError
from rayrlhf.models.routing_replay import expert_count

_FLAG = "enable_return_routed_experts"


def routing_settings() -> dict[str, Any]:
    """Return vLLM's settings with which it returns experts.

    Raises:
        UserError: this version has none for GPUs.
    """
    from vllm.engine.arg_utils import EngineArgs

    if not torch.cuda.is_available():
        return {}
    if _FLAG not in EngineArgs.__dataclass_fields__:
        raise UserError(f"rollout.routing_replay 'rollout': this vLLM has no {_FLAG}; expected 'off'")
    return {_FLAG: True}


class RoutingCapture:
    """Collects the experts of an engine's requests."""

    def __init__(self, engine: Any, path: str) -> None:
        """Install the hooks.

        Raises:
            UserError: this version of vLLM has none for the model.
        """
        self._experts = expert_count(engine.model_config.hf_config, path)
        self._parts: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        self._step: dict[int, NDArray[Any]] = {}
        self._hooked = not torch.cuda.is_available()
        if self._hooked:
            try:
                self._install(engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
            except (AttributeError, ImportError) as error:
                raise UserError(
                    f"rollout.routing_replay 'rollout': this vLLM shows no experts of {path} ({error}); expected 'off'"
                ) from error

    def _install(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        layers = [module for module in runner.model.modules() if isinstance(module, MoERunner)]
        for layer, module in enumerate(layers):
            module.router.set_capture_fn(partial(self._see, layer))
        runner.execute_model = partial(self._execute, runner, runner.execute_model)

    def _see(self, layer: int, ids: torch.Tensor) -> None:
        self._step[layer] = ids.cpu().numpy().copy()

    def _execute(self, runner: Any, execute: Any, scheduled: Any, *arguments: Any, **named: Any) -> Any:
        """Run a step, and assign the rows that it computed to its requests."""
        self._step.clear()
        output = execute(scheduled, *arguments, **named)
        if self._step:
            rows, at = np.stack([self._step[layer] for layer in sorted(self._step)], 1), 0
            for request in runner.input_batch.req_ids:
                count = scheduled.num_scheduled_tokens.get(request, 0)
                if count:
                    start = int(runner.requests[request].num_computed_tokens)
                    name = request.rpartition("-")[0]  # vLLM adds random letters to the name of a request
                    self._parts.setdefault(name, []).append((start, rows[at : at + count]))
                    at += count
        return output

    def take(self, output: Any) -> ExpertIds:
        """Return the experts of a finished request, and forget them."""
        (sample,) = output.outputs
        if not self._hooked and sample.routed_experts is None:
            raise UserError(f"rollout.routing_replay 'rollout': vLLM returned no experts in spite of {_FLAG}; expected 'off'")
        found = self._parts.pop(output.request_id) if self._hooked else [(0, sample.routed_experts)]
        return compact(found, len(output.prompt_token_ids) + len(sample.token_ids), self._experts)

    def clear(self) -> None:
        """Forget unfinished requests."""
        self._parts.clear()
