"""DeepSpeed around a network: sharding of optimizer, gradients and weights (ZeRO, Rajbhandari et al. 2020), and nothing else.

Of DeepSpeed's conveniences this project uses as few as it can: the optimizer is torch's, losses are aggregated by us, the end
of gradient accumulation is set by hand, and no operator is compiled.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rayrlhf.config.train import TrainSection

PARTITION_THRESHOLD = 10_000
"""ZeRO-3 keeps parameters with fewer elements whole on every rank."""


def wrap(network: nn.Module, optimizer: torch.optim.Optimizer, train: TrainSection, dtype: torch.dtype) -> Any:
    """Return a DeepSpeed engine over the network.

    The process must have joined its process group. At ZeRO-0 the engine neither clips nor divides; at every stage the loss must
    be multiplied by the number of ranks, because DeepSpeed averages gradients over them.

    Args:
        network: in float32, on its device.
        optimizer: over the network's trainable parameters.
        train: stage, offloading and clipping.
        dtype: compute dtype; anything but float32 runs under autocast with float32 master weights.
    """
    deepspeed = _quiet_deepspeed()
    # The shared-memory operator serves inference only; without this, DeepSpeed compiles it for half a minute on every new node.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=_config(train, dtype))
    if train.zero_stage == 0 and torch.distributed.get_world_size() == 1:
        # Nothing to reduce with one rank, and flattening all gradients costs two passes over memory.
        engine.enable_backward_allreduce = False
    return engine


def zero_gradients(engine: Any, stage: int) -> None:
    """Set the gradient of the optimizer step to zero, wherever the stage keeps it. Call between backward and step."""
    from deepspeed.utils import safe_set_full_grad

    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            if parameter.grad is not None:
                parameter.grad.zero_()
        else:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            safe_set_full_grad(parameter, torch.zeros(shape, dtype=torch.float32, device=engine.device))


@contextmanager
def whole(parameters: tuple[nn.Parameter, ...]) -> Iterator[None]:
    """Gather ZeRO-3 shards inside the block (every rank must take part); nothing to do for whole parameters."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded):
        yield


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
        # At ZeRO-0 DeepSpeed would clip without telling the norm, so the engine does it itself.
        "gradient_clipping": (train.max_grad_norm or 0.0) if train.zero_stage > 0 else 0.0,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": None,
    }


def _quiet_deepspeed() -> Any:
    """Import DeepSpeed with its logger at WARNING: it reports its whole configuration at INFO, from every process."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
