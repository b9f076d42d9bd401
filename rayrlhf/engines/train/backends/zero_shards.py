"""ZeRO-3's division of weights, applied to each weight as soon as it is read.

DeepSpeed takes over parameters that are divided already. Until it does, `in_use` gathers them for the checks on load, one
module at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ZeroShards:
    """Weights divided over all ranks (see `rayrlhf.models.direct_load.WeightShards`).

    Attributes:
        device: of this rank's part.
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        """Prepare DeepSpeed; the process has joined its process group.

        Args:
            config: DeepSpeed's, of the engine that will train the network.
            device: of this rank's part.
        """
        import deepspeed

        self.device = device
        self._init = deepspeed.zero.Init(config_dict_or_path=config)
        # DeepSpeed does this where it divides a module itself; results of products may differ in their last bits without it.
        self._init._enable_mem_efficient_linear()

    def own_rows(self, shape: torch.Size) -> slice:
        """Return the rows that hold this rank's part of the flat weight."""
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        part = -(-shape.numel() // ranks)
        row = max(1, math.prod(shape[1:]))
        first, last = min(rank * part, shape.numel()), min((rank + 1) * part, shape.numel())
        return slice(first // row, -(-last // row))

    def settle(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of a parameter.

        All ranks read the same file, so DeepSpeed's broadcast from rank 0 is left out.
        """
        parameter.data = parameter.data.to(self.device)
        self._init._convert_to_deepspeed_param(parameter)
        cast(Any, parameter).partition()

    def narrow(self, parameter: nn.Parameter, part: Callable[[Tensor], Tensor], group: "ProcessGroup") -> None:
        """Divide a part of a parameter over a group (see `rayrlhf.models.direct_load.WeightShards`).

        One that is gathered stays so. One that is not divided yet, an adapter's, is divided by DeepSpeed later.
        """
        own = cast(Any, parameter)
        own.ds_zero_partition_process_group = group
        divided, gathered = hasattr(own, "ds_id"), own.numel() > 0
        if divided:
            own.all_gather(param_list=[own])
        own.data = part(own.detach()).clone()
        if divided:
            self.settle(own)
        if divided and gathered:
            own.all_gather(param_list=[own])

    @contextmanager
    def in_use(self, network: nn.Module) -> Iterator[None]:
        """Gather the parameters of each module for the time of its call.

        Backward passes gather them again. The output layer's stay whole: checks read them without calling it. Every rank makes
        the same calls.
        """
        live: dict[int, nn.Parameter] = {}

        def gather(parameter: Any) -> None:
            parameter.all_gather(param_list=[parameter])
            live[parameter.untyped_storage().data_ptr()] = parameter

        def release(parameter: Any) -> None:
            live.pop(parameter.untyped_storage().data_ptr(), None)
            parameter.partition(param_list=[parameter])

        def enter(own: Mapping[str, nn.Parameter], module: nn.Module, *_: object) -> None:
            for name, parameter in own.items():
                gather(parameter)
                if not parameter.requires_grad:  # recomputed activations keep what they see, which must outlive the release
                    module._parameters[name] = cast(nn.Parameter, parameter.detach())

        def leave(own: Mapping[str, nn.Parameter], module: nn.Module, *_: object) -> None:
            for name, parameter in own.items():
                module._parameters[name] = parameter
                release(parameter)

        def pack(tensor: Tensor) -> Any:
            parameter = live.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if parameter is None:
                return tensor.detach()  # an output that its own node keeps would be freed never
            return parameter, tensor.shape, tensor.stride(), tensor.storage_offset() - parameter.storage_offset()

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            parameter, shape, stride, offset = saved
            gather(parameter)
            value = torch.as_strided(parameter.detach(), shape, stride, parameter.storage_offset() + offset).clone()
            release(parameter)
            return value

        head = getattr(network, "get_output_embeddings", lambda: None)()
        whole = [] if head is None else list(_divided(head).values())
        kept = {id(parameter) for parameter in whole}
        with ExitStack() as stack:
            for module in network.modules():
                own = {name: parameter for name, parameter in _divided(module).items() if id(parameter) not in kept}
                if own:
                    stack.callback(module.register_forward_pre_hook(partial(enter, own)).remove)
                    stack.callback(module.register_forward_hook(partial(leave, own), always_call=True).remove)
            for parameter in whole:
                parameter.all_gather(param_list=[parameter])
                stack.callback(parameter.partition, param_list=[parameter])
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            yield


def _divided(module: nn.Module) -> dict[str, Any]:
    """Return a module's own parameters that are divided."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if hasattr(parameter, "ds_id")}
