"""Unmerged LoRA adapter in vLLM: a weight sync carries the adapter's tensors only.

A merged update is rounded to the engine's dtype together with the base weights. On bfloat16 weights most of a small update is
lost there: 3 % of it arrives at learning rate 1e-5 after 16 steps. An adapter of its own keeps it, because its matrices are
rounded relative to their own size.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import WEIGHTS_FILE, adapter_parameters, peft_config
from rayrlhf.models.load import load_architecture
from rayrlhf.models.lora import add_lora
from rayrlhf.weight_sync.buckets import WeightBucket

MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108
FOLDER_PREFIX = "rayrlhf-adapter-"
NEW_SECONDS = 10.0
"""Age up to which a folder without a lock may be that of a process about to lock it."""
INSTEAD = "set rollout.lora=merged"


def lora_settings(model: ModelSection) -> dict[str, Any]:
    """Return vLLM's engine arguments for one adapter.

    Raises:
        UserError: the rank exceeds vLLM's largest.
    """
    if model.lora is None:
        raise ValueError("a model without adapters has none to serve")
    rank = served_rank(model.lora.rank, f"model.lora.rank {model.lora.rank}", INSTEAD)
    if not torch.cuda.is_available():
        use_plain_products()
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def served_rank(rank: int, where: str, remedy: str) -> int:
    """Return the rank that vLLM allocates for adapters, at least their own.

    Raises:
        UserError: it exceeds vLLM's largest; the line begins with `where` and ends with `remedy`.
    """
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    for one in ranks:
        if one >= rank:
            return one
    raise UserError(f"{where}: vLLM serves adapters up to rank {ranks[-1]}; {remedy}")


class AdapterSlot:
    """The adapter of all requests of an engine.

    Args:
        engine: an `LLMEngine` started with `lora_settings`.
        model: base model and adapter settings.

    Attributes:
        request: vLLM's `LoRARequest`, to be passed with every request.

    Raises:
        UserError: vLLM cannot serve adapters of these modules.
    """

    def __init__(self, engine: Any, model: ModelSection) -> None:
        from vllm.lora.request import LoRARequest

        self._engine = engine
        self._tensors: dict[str, Tensor] = {}
        # vLLM reads the folder of an adapter that is not loaded, which this one always is.
        self.request = LoRARequest("policy", 1, "loaded")
        # Requests before the first sync need the adapter too, so that its weights can change under them.
        zero, layers = _zero_adapter(model)
        self._shapes = {name: tensor.shape for name, tensor in zero.items()}
        self._config = peft_config(model, zero, layers)
        # Scaled on receipt: vLLM would take one more pass over every B, after its load.
        self._scale = self._config.lora_alpha / self._config.r
        self._config.lora_alpha = self._config.r
        try:
            self._load(zero)
        except ValueError as error:
            raise UserError(f"model.lora.target_modules: vLLM cannot serve these adapters; {INSTEAD} ({error})") from error

    def receive(self, bucket: WeightBucket) -> None:
        """Copy one bucket of the adapter, under the names of PEFT's files, and scale B."""
        self._tensors |= {name: tensor * self._scale if ".lora_B." in name else tensor.clone() for name, tensor in bucket}

    def load(self) -> None:
        """Replace the adapter by the received tensors.

        Raises:
            ValueError: tensors are missing, or do not belong to the adapter.
        """
        wrong = sorted(name for name, shape in self._shapes.items() if getattr(self._tensors.get(name), "shape", None) != shape)
        wrong += sorted(set(self._tensors) - set(self._shapes))
        if wrong:
            raise ValueError(
                f"weight update ended with {len(wrong)} adapter tensors missing or unknown: {', '.join(wrong[:3])}"
            )
        tensors, self._tensors = self._tensors, {}
        self._load(tensors)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        from vllm.lora.request import LoRARequest

        with memory_folder() as folder:
            self._config.save_pretrained(folder)
            save_file(dict(tensors), folder / WEIGHTS_FILE, {"format": "pt"})
            # A request with this flag would load the adapter in every decoding step.
            if not self._engine.add_lora(LoRARequest("policy", 1, str(folder), load_inplace=True)):
                raise RuntimeError("vLLM did not load the adapter")
        _fused.clear()


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Create a folder in shared memory for one load of an adapter.

    It is removed after the load, and folders of killed processes with it. A folder in use is locked. The lock ends with its
    process.
    """
    parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # in use, of another user, or just removed
            if time.time() - leftover.stat().st_mtime > NEW_SECONDS:
                with _locked(leftover):
                    shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir=parent) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def use_plain_products() -> None:
    """Compute LoRA layers on CPUs by two matrix products per layer.

    vLLM 0.32 gathers the adapter's matrices once per token on CPUs. With one adapter for all requests no gather is needed, and
    the slices of a layer (q, k, v; gate, up) fit into one product each. This patches vLLM's class in this process.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    PunicaWrapperCPU.add_lora_linear = _add_lora_linear


def _add_lora_linear(
    _: object,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **__: object,
) -> None:
    """Add `x A^T B^T * scale` to `y`.

    `x` is [tokens, in], `y` [tokens, out], A [1, 1, rank, in] and B [1, 1, slice, rank] of each slice.
    """
    inputs, output = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    key = lora_a_stacked[0].data_ptr()
    if key not in _fused:
        down = [a[0, 0] for a in lora_a_stacked]
        up = [b[0, 0, :size] for b, size in zip(lora_b_stacked, output_slices, strict=True)]
        _fused[key] = (down[0], up[0]) if len(up) == 1 else (torch.cat(down), torch.block_diag(*up))  # type: ignore[no-untyped-call]
    a, b = _fused[key]
    output[:, : len(b)].addmm_(inputs @ a.T, b.T, alpha=scale)


_fused: dict[int, tuple[Tensor, Tensor]] = {}
"""A [ranks, in] and block-diagonal B [out, ranks] of a layer's slices, by the address of the first A; until the next load."""


def _zero_adapter(model: ModelSection) -> tuple[dict[str, Tensor], int]:
    """Return an adapter of zeros, and the number of decoder layers."""
    from transformers import AutoModelForCausalLM

    if model.lora is None:
        raise ValueError("a model without adapters has no zero adapter")
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(load_architecture(model), trust_remote_code=model.trust_remote_code)
        add_lora(network, model.lora, 0)
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in adapter_parameters(network)}
    return zeros, int(network.config.num_hidden_layers)
