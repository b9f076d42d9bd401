"""Adapters as a PEFT folder for transformers, PEFT and vLLM; merging into the base model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel, Tokenizer
from rayrlhf.models.load import checkpoint_dtype, load_causal_model, save_model_folder
from rayrlhf.models.lora import checkpoint_tensors
from rayrlhf.models.model_path import resolve_path
from rayrlhf.models.rounding import UpdateShare, write_share
from rayrlhf.storage.atomic import folder_atomically

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = ".default."


def adapter_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters under the names of PEFT's files."""
    for name, parameter in network.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield "base_model.model." + name.replace(_ADAPTER, "."), parameter


def save_adapters(
    network: PreTrainedModel, model: ModelSection, state: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a PEFT folder atomically.

    Args:
        network: transformers model with the adapters.
        model: path of the base, and settings of the adapters.
        state: adapters by name, see `adapter_parameters`.
        tokenizer: saved with them.
        folder: path to write; an older folder is replaced.
    """
    config = peft_config(model, state, int(network.config.num_hidden_layers))
    with folder_atomically(folder, if_exists="replace") as partial:
        config.save_pretrained(partial)
        save_file(dict(state), partial / WEIGHTS_FILE, {"format": "pt"})
        tokenizer.save_pretrained(partial)


def peft_config(model: ModelSection, state: Mapping[str, Tensor], layers: int) -> Any:
    """Return PEFT's `LoraConfig` of adapters by name, in a model with `layers` decoder layers.

    Raises:
        ValueError: the model has no adapters.
    """
    from peft import LoraConfig

    if model.lora is None:
        raise ValueError("a model without adapters has none to save")
    suffix, last, path = ".lora_A.weight", model.lora.last_layers, resolve_path(model)
    return LoraConfig(
        r=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=sorted({_module_name(name.removesuffix(suffix)) for name in state if name.endswith(suffix)}),
        layers_to_transform=None if last is None else list(range(layers - last, layers)),
        task_type="CAUSAL_LM",
        # Absolute, so that they are merged into this model from any working directory.
        base_model_name_or_path=str(Path(path).absolute()) if Path(path).is_dir() else path,
        revision=model.revision,
        inference_mode=True,
    )


def _module_name(path: str) -> str:
    """Return the end of a module's path that names it.

    For a layer in a list it is the list's name with the number, which alone would name decoder layers, too.
    """
    parts = path.split(".")
    first = next(index for index in range(len(parts) - 1, -1, -1) if not parts[index].isdecimal())
    return ".".join(parts[first:])


def is_adapter_folder(folder: Path) -> bool:
    """Return True if a folder holds adapters and no whole model."""
    return (folder / CONFIG_FILE).is_file()


def merge_adapters(folder: Path, target: Path, *, trust_remote_code: bool = False) -> float | None:
    """Write a Hugging Face folder of the base model merged with adapters.

    The base has the revision of the run, and the folder the dtype of the base.

    Args:
        folder: adapters.
        target: folder to write; an older one is replaced.
        trust_remote_code: execute Python code of the base model, as the run did.

    Returns:
        Share of the adapters' update that the folder's dtype keeps; None without an update.

    Raises:
        UserError: the folder holds no adapters, or the base model cannot be loaded.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    if not is_adapter_folder(folder):
        raise UserError(f"{folder}: no {CONFIG_FILE} in it, expected a folder of adapters")
    adapters = PeftConfig.from_pretrained(str(folder))
    base = ModelSection(
        path=str(adapters.base_model_name_or_path),
        revision=adapters.revision,
        trust_remote_code=trust_remote_code,
        dtype="float32",
        attention="eager",  # every architecture has it
    )
    adapted, share, dtype = (
        PeftModel.from_pretrained(load_causal_model(base), str(folder)),
        UpdateShare(),
        checkpoint_dtype(base),
    )
    for tensor in checkpoint_tensors(adapted.get_base_model()):
        if tensor.base is not None:
            value = tensor.value()
            share.add(tensor.base.detach(), value, value.to(dtype))
    merged = adapted.merge_and_unload()
    buffers = {name for name, _ in merged.named_buffers()}
    state = {name: tensor if name in buffers else tensor.to(dtype) for name, tensor in merged.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    save_model_folder(target, merged, state, tokenizer, dtype=dtype)
    write_share(target, share.value, dtype)
    return share.value
