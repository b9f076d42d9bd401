"""DeepSpeed backend, which shards optimizer states, gradients and weights.

It uses ZeRO (Rajbhandari et al. 2020) and as few of DeepSpeed's conveniences as possible: the optimizer is torch's, losses are
aggregated by the engine, gradient accumulation boundaries are set by hand, and no operator is compiled.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.backends import deepspeed_resize, deepspeed_state
from rayrlhf.engines.train.backends.base import StateFiles
from rayrlhf.engines.train.backends.zero_shards import ZeroShards
from rayrlhf.engines.train.optimizers import RATE_FACTOR
from rayrlhf.library_types import DeepSpeedEngine
from rayrlhf.models.expert_parallel import ExpertSplit
from rayrlhf.models.network import Network
from rayrlhf.models.network_io import NetworkOutput
from rayrlhf.models.tensor_parallel import WeightSplit

PARTITION_THRESHOLD = 10_000
"""ZeRO-3 keeps parameters with fewer elements whole on every rank."""


class DeepSpeedBackend:
    """Train backend on DeepSpeed, at ZeRO stages 0 to 3. See `TrainBackend` for the protocol."""

    def __init__(self, engine: DeepSpeedEngine, stage: int, split: WeightSplit | None = None) -> None:
        self.shards_parameters = stage == 3
        self.all_ranks_must_forward = self.shards_parameters or isinstance(split, ExpertSplit)
        self._engine = engine
        self._stage = stage
        self._split = split
        averages_experts = self.shards_parameters and isinstance(split, ExpertSplit)
        self._data_ranks = torch.distributed.get_world_size() // (1 if split is None or averages_experts else split.size)

    @classmethod
    def weight_shards(cls, train: TrainSection, dtype: torch.dtype, device: torch.device) -> ZeroShards | None:
        """Return ZeRO-3's division of weights (see `TrainBackend.weight_shards`)."""
        if train.zero_stage < 3:
            return None
        _prepare_deepspeed()
        return ZeroShards(_config(train, dtype), device)

    @classmethod
    def wrap(cls, network: Network, optimizer: torch.optim.Optimizer, train: TrainSection, dtype: torch.dtype) -> Self:
        """Wrap a network (see `TrainBackend.wrap`)."""
        deepspeed = _prepare_deepspeed()
        split = network.weight_split
        groups = None if split is None else _ModelParallelGroups(split)
        if isinstance(split, ExpertSplit):  # DeepSpeed's own hooks run later and add up ranks with equal experts
            if train.zero_stage == 3:
                split.average_gradients(network.parameters())
            else:
                split.sum_gradients(network.parameters(), always=train.zero_stage == 2)
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=_config(train, dtype), mpu=groups)
        backend = cls(engine, train.zero_stage, split)
        if train.zero_stage == 0 and backend._data_ranks == 1:
            # One rank has nothing to reduce, and flattening all gradients costs two passes over memory.
            engine.enable_backward_allreduce = False
        return backend

    def forward(self, *inputs: Any) -> NetworkOutput:
        """Call the network (see `TrainBackend.forward`)."""
        output: NetworkOutput = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient (see `TrainBackend.backward`)."""
        self._engine.set_gradient_accumulation_boundary(last)
        if isinstance(self._split, ExpertSplit):
            self._split.step_follows = last
        # DeepSpeed averages gradients over the ranks that hold the same weights; the protocol asks for their sum.
        self._engine.backward(loss * self._data_ranks, scale_wrt_gas=False)

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Clip the gradient and step the optimizer (see `TrainBackend.step`)."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)
        if self._stage == 0:
            parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
            total = _gradient_norm(parameters, self._split)
            torch.nn.utils.clip_grads_with_norm_(parameters, math.inf if max_norm is None else max_norm, total)
            norm = float(total)
            if not math.isfinite(norm):
                return self.discard()
            engine.step()
            return norm
        if engine.optimizer.has_overflow():
            return self.discard()
        engine.optimizer.clip_grad = max_norm or 0.0
        engine.step()
        return float(engine.get_global_grad_norm())

    def discard(self) -> float:
        """Finish a step by a zero gradient at learning rate 0 (see `TrainBackend.discard`)."""
        self.zero_grad()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.step()
        return math.nan

    def zero_grad(self) -> None:
        """Set the accumulated gradient to zero, in the place where the ZeRO stage keeps it."""
        from deepspeed.utils import safe_set_full_grad

        for parameter in self._engine.module.parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 0:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            else:
                shape = parameter.shape
                if self._stage == 3:  # the parts of all ranks, the last ones padded
                    shape = torch.Size([parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_world_size])
                safe_set_full_grad(parameter, torch.zeros(shape, dtype=torch.float32, device=self._engine.device))

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather ZeRO-3 shards inside the block; no-op for whole parameters."""
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not sharded:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(sharded):
            yield

    def capture_state(self, counters: Mapping[str, int]) -> StateFiles:
        """Copy this rank's part of the state (see `TrainBackend.capture_state`)."""
        return deepspeed_state.capture(self._engine, counters)

    def load_state(self, folder: Path) -> Mapping[str, int]:
        """Restore this rank's part of the state (see `TrainBackend.load_state`)."""
        return deepspeed_state.load_checkpoint(self._engine, folder)

    def load_resized_state(self, folder: Path) -> Mapping[str, int]:
        """Restore the state of another number of ranks (see `TrainBackend.load_resized_state`)."""
        return deepspeed_resize.load_resized(self._engine, folder)


class _ModelParallelGroups:
    """Groups of ranks under the names that DeepSpeed reads (`mpu`)."""

    def __init__(self, split: WeightSplit) -> None:
        self.key = split.key
        self._model, self._data = split.group, split.data_group

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._model)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._data)


def _gradient_norm(parameters: Sequence[nn.Parameter], split: WeightSplit | None) -> Tensor:
    """Return the norm of the whole gradient at ZeRO-0."""
    if split is not None:
        return split.gradient_norm(parameters)
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _config(train: TrainSection, dtype: torch.dtype) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PARTITION_THRESHOLD
    if train.offload_optimizer and train.zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # At ZeRO-0 DeepSpeed clips without reporting the norm, so `step` clips.
        "gradient_clipping": (train.max_grad_norm or 0.0) if train.zero_stage > 0 else 0.0,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": None,
    }


def _prepare_deepspeed() -> Any:
    """Import DeepSpeed, quiet and without groups of a world that has ended."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # at INFO every process logs its whole configuration
    # The shared-memory operator serves inference only; without this, DeepSpeed compiles it for half a minute on every node.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed keeps a copy of the world's group, also after other libraries of this process ended that world.
    groups = vars(deepspeed.utils.groups)
    if groups["_WORLD_GROUP"] not in torch.distributed.distributed_c10d._world.pg_group_ranks:
        groups["_WORLD_GROUP"] = None
    groups["mpu"] = None  # that of an earlier network
    return deepspeed
