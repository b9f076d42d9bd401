"""Loading and saving of weights and tokenizers as Hugging Face models.

A model is a local folder, a hub name or a built-in. Master weights are always float32; `resolve_dtype` gives the compute dtype,
applied by autocast, so that a policy and its reference run the same arithmetic.
"""

import difflib
import json
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection, Precision
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel, Tokenizer
from rayrlhf.storage.atomic import folder_atomically

EXPORT, MERGED = "export", "export-merged"
"""Folders of a run's model in the run folder: as trained, and with merged adapters."""
HUB_SECONDS = 3.0
"""Time to reach the hub."""
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "value_head/*"]
"""Files of a hub model that anything here reads."""
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


def resolve_dtype(precision: Precision) -> torch.dtype:
    """Return the compute dtype of a setting.

    `auto` is bfloat16 on hardware that multiplies fast in it, else float32. Fast hardware is a GPU, or a CPU with AVX512-BF16
    or AMX; elsewhere bfloat16 products are emulated and several times slower.
    """
    if precision != "auto":
        return cast(torch.dtype, getattr(torch, precision))
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _BF16_CPU_FLAGS & _cpu_flags() else torch.float32


def resolve_path(model: ModelSection) -> str:
    """Return the folder or hub name of `model.path`; builds a built-in that is not cached.

    A run folder is the model that the run exported.

    Raises:
        UserError: a path that is neither a model folder nor a possible hub name, a run without a model, or an unknown built-in.
    """
    if model.path.startswith("builtin:"):
        from rayrlhf.models.builtin import resolve_model

        return str(resolve_model(model.path))
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            folder = _model_of_run(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path {model.path!r}: the folder has no config.json, expected a Hugging Face model folder")
        return str(folder)
    parent = folder.parent
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1 or (parent != Path() and parent.is_dir()):
        near = difflib.get_close_matches(folder.name, [one.name for one in parent.glob("*/")], n=1)
        raise UserError(f"model.path {model.path!r}: no such folder{f'; did you mean {parent / near[0]}?' if near else ''}")
    use_hub_cache_if_offline()
    return model.path


@cache
def use_hub_cache_if_offline() -> None:
    """Use the hub's cache only, if the hub cannot be reached.

    Asking it takes a minute of retries. Behind a proxy it is asked.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes of the run
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _model_of_run(run: Path) -> Path:
    """Return the folder of a run's model, its adapters merged."""
    merged, export = run / MERGED, run / EXPORT
    if merged.is_dir():
        return merged
    if not export.is_dir():
        raise UserError(f"model.path {str(run)!r}: this run has no model in {EXPORT}/ yet; finish it first")
    if not (export / "config.json").is_file():
        raise UserError(f"model.path {str(run)!r}: {EXPORT}/ holds adapters; merge them with `rayrlhf export {run} --merge`")
    return export


def model_folder(model: ModelSection) -> Path:
    """Return the folder with the model's files.

    A hub model is in the local cache, downloaded if it is missing.

    Raises:
        UserError: no such folder or hub model.
    """
    path = resolve_path(model)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=model.revision, allow_patterns=_FILES))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.path {model.path!r}: {_first_line(error)}") from error


def load_causal_model(model: ModelSection) -> nn.Module:
    """Load a causal language model in float32 on the CPU, in evaluation mode.

    Raises:
        UserError: the path cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    network: nn.Module = _from_pretrained(AutoModelForCausalLM, model)
    return network


def load_trunk(model: ModelSection) -> nn.Module:
    """Load the model without its output layer in float32 on the CPU, in evaluation mode.

    This is the trunk of a separate critic.

    Raises:
        UserError: the path cannot be loaded.
    """
    from transformers import AutoModel

    network: nn.Module = _from_pretrained(AutoModel, model)
    return network


def load_architecture(model: ModelSection) -> Any:
    """Load the model's transformers configuration, without weights.

    Raises:
        UserError: the path cannot be loaded.
    """
    from transformers import AutoConfig

    path = resolve_path(model)
    try:
        return AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {model.path!r}: {_first_line(error)}") from error


def require_text_model(architecture: Any, model: ModelSection) -> None:
    """Refuse multimodal models: roles would load different parts of them.

    Raises:
        UserError: names the family.
    """
    if architecture.get_text_config() is not architecture:
        raise UserError(
            f"model.path {model.path!r}: {architecture.model_type} is a multimodal model, expected a text-only checkpoint"
        )


def load_tokenizer(model: ModelSection) -> Tokenizer:
    """Load the tokenizer, with a pad token; `model.chat_template` replaces its own template.

    Raises:
        UserError: no tokenizer at the path, or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    path = resolve_path(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {model.path!r}: cannot load its tokenizer: {_first_line(error)}") from error
    if tokenizer.vocab_size == 0:
        raise UserError(f"model.path {model.path!r}: the folder has no tokenizer files")
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"model.chat_template {str(model.chat_template)!r}: cannot be read: {error.strerror}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model_folder(
    folder: Path,
    network: PreTrainedModel,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face folder atomically: config, safetensors, generation config, tokenizer.

    Args:
        folder: path to write; an older folder is replaced.
        network: transformers model with config and names; its own weights are not read.
        state: tensors by checkpoint name.
        tokenizer: saved with the weights, if given.
        extra: further safetensors files, by file name.
        dtype: of the weights, recorded in the configuration.
    """
    _repair_generation_config(network)
    with folder_atomically(folder, if_exists="replace") as partial:
        network.save_pretrained(partial, state_dict=dict(state))
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, tensors in (extra or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), partial / name)


def checkpoint_dtype(model: ModelSection) -> torch.dtype:
    """Return the dtype of the model's published weights; float32 if its configuration names none."""
    named = load_architecture(model).dtype
    return cast(torch.dtype, getattr(torch, named) if isinstance(named, str) else named or torch.float32)


def _repair_generation_config(network: PreTrainedModel) -> None:
    """Switch sampling on in an inconsistent generation config.

    Transformers does not save one that has a temperature without sampling.
    """
    config = getattr(network, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def disable_dropout(network: nn.Module) -> None:
    """Set every dropout probability to 0, those that layers hold as plain numbers included.

    Training mode, which gradient checkpointing needs, then changes nothing.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _from_pretrained(auto_class: Any, model: ModelSection) -> Any:
    path = resolve_path(model)
    require_text_model(load_architecture(model), model)
    try:
        network, report = auto_class.from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=model.attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = _first_line(error)
        if "attention implementation" in reason:
            reason = f"this architecture has no {model.attention} attention; expected model.attention: eager"
        raise UserError(f"model.path {model.path!r}: cannot load it: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise UserError(f"model.path {model.path!r}: {len(missing)} weights are not in the files, the first is {missing[0]}")
    return network.eval()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _cpu_flags() -> set[str]:
    if not os.access("/proc/cpuinfo", os.R_OK):
        return set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
