"""Loading and saving of weights and tokenizers as Hugging Face models.

A model is a local folder, a hub name or a built-in. Weights to train are always float32; `resolve_dtype` gives the compute
dtype, applied by autocast, so that a policy and its reference run the same arithmetic.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection, Precision
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, PreTrainedModel, Tokenizer
from rayrlhf.models.direct_load import NotDirectError, WeightShards, load_directly
from rayrlhf.models.held_weights import hold
from rayrlhf.models.model_files import check_texts, check_weights, has_weights, stored_dtype
from rayrlhf.models.model_path import model_folder, one_line_reason, present_folder, resolve_path
from rayrlhf.models.stacked_weights import only_stacks, unstacked
from rayrlhf.models.tensor_files import TensorStream, write_stream
from rayrlhf.storage.atomic import folder_atomically

_HEADS = re.compile(r"(lm_head|embed_out|output|cls)\b")
"""Output layers, which a trunk leaves in the files."""
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}
_LOG = logging.getLogger(__name__)
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


def resolve_dtype(precision: Precision, *, cpu: bool = False) -> torch.dtype:
    """Return the compute dtype of a setting.

    `auto` is bfloat16 on hardware that multiplies fast in it, else float32. Fast hardware is a GPU, or a CPU with AVX512-BF16
    or AMX; elsewhere bfloat16 products are emulated and several times slower. With `cpu` a GPU does not count.
    """
    if precision != "auto":
        return cast(torch.dtype, getattr(torch, precision))
    if not cpu and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _BF16_CPU_FLAGS & _cpu_flags() else torch.float32


def load_causal_model(model: ModelSection, *, frozen: bool = False, shards: WeightShards | None = None) -> nn.Module:
    """Load a causal language model in evaluation mode.

    Args:
        model: the model; its adapters are not built.
        frozen: hold the weights in the dtype of the checkpoint (`rayrlhf.models.held_weights`) instead of float32.
        shards: keep this rank's part of each weight; None keeps all of them, on the CPU.

    Raises:
        UserError: the path cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    network: nn.Module = _load(AutoModelForCausalLM, model, frozen, shards)
    return network


def load_trunk(model: ModelSection, *, frozen: bool = False, shards: WeightShards | None = None) -> nn.Module:
    """Load the model without its output layer, the trunk of a separate critic (see `load_causal_model`)."""
    from transformers import AutoModel

    network: nn.Module = _load(AutoModel, model, frozen, shards)
    return network


def load_encoder(model: ModelSection) -> tuple[Tokenizer, PreTrainedModel]:
    """Load a text encoder and its tokenizer, in float32 on the CPU.

    Raises:
        UserError: the path cannot be loaded, or lacks weights of the encoder. Those of a pooler are not used.
    """
    from transformers import AutoModel

    tokenizer, folder = load_tokenizer(model), resolve_path(model)
    with _reading(model, "cannot load it: "):
        network, report = AutoModel.from_pretrained(folder, dtype="float32", output_loading_info=True)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(f"model.path {model.path!r}: {len(missing)} weights are not in the files, the first is {missing[0]}")
    return tokenizer, network.eval()


def load_architecture(model: ModelSection) -> Any:
    """Load the model's transformers configuration, without weights.

    Raises:
        UserError: the path cannot be loaded.
    """
    from transformers import AutoConfig

    path = resolve_path(model)
    with _reading(model):
        return AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def check_architecture(architecture: Any, model: ModelSection) -> None:
    """Refuse quantized models, and models other than causal language models of text.

    Roles would load different parts of a multimodal model, and its exports would not match their configuration.

    Raises:
        UserError: names the family, or the quantization.
    """
    family = architecture.model_type
    if architecture.get_text_config() is not architecture:
        raise UserError(f"model.path {model.path!r}: {family} is a multimodal model, expected a text-only checkpoint")
    if getattr(architecture, "is_encoder_decoder", False):
        raise UserError(f"model.path {model.path!r}: {family} is an encoder-decoder model, expected a causal language model")
    if not isinstance(getattr(architecture, "vocab_size", None), int):
        raise UserError(f"model.path {model.path!r}: {family} has no vocabulary, expected a causal language model")
    quantization = getattr(architecture, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "no quant_method") if isinstance(quantization, dict) else "unknown"
        raise UserError(
            f"model.path {model.path!r}: a quantized checkpoint ({method}), expected weights in float32, float16 or bfloat16"
        )


def load_tokenizer(model: ModelSection) -> Tokenizer:
    """Load the tokenizer, with a pad token; `model.chat_template` replaces its own template.

    Raises:
        UserError: no tokenizer at the path, or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    path = resolve_path(model)
    with _reading(model, "cannot load its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
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
    state: Mapping[str, Tensor] | TensorStream,
    tokenizer: Tokenizer | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face folder atomically: config, safetensors, generation config, tokenizer.

    Args:
        folder: path to write; an older folder is replaced.
        network: transformers model with config and names; its own weights are not read.
        state: tensors by the network's names; a stream is written as it comes, unless transformers computes the weights of
            this family from others on save, for which it needs all of them.
        tokenizer: saved with the weights, if given.
        extra: additional safetensors files, by file name.
        dtype: of the weights, recorded in the configuration.
    """
    _repair_generation_config(network)
    with folder_atomically(folder, if_exists="replace") as partial:
        if isinstance(state, TensorStream) and only_stacks(network):
            network.save_pretrained(partial, state_dict={})
            write_stream(partial, unstacked(network, state))
        else:
            if isinstance(state, TensorStream):
                state = {name: tensor.clone() for name, tensor in state.tensors}
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
    """Return the dtype of the model's published weights.

    It comes from the configuration, or from the files if the configuration has none.
    """
    return _dtype_of(load_architecture(model), model)


def _dtype_of(architecture: PretrainedConfig, model: ModelSection) -> torch.dtype:
    named = architecture.dtype
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(found, torch.dtype):
        return found
    folder = present_folder(model)
    stored = None if folder is None else stored_dtype(folder)
    return _STORED.get(stored or "", torch.float32)


def _repair_generation_config(network: PreTrainedModel) -> None:
    """Repair an inconsistent generation config, which transformers does not save.

    One with a temperature gets sampling; of one that is still invalid only the special tokens are kept.
    """
    from transformers import GenerationConfig

    config = getattr(network, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        config.do_sample = True
        try:
            config.validate(strict=True)
        except (ValueError, TypeError):
            tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            network.generation_config = GenerationConfig(**{name: one for name, one in tokens.items() if one != -1})


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


def _load(auto_class: Any, model: ModelSection, frozen: bool, shards: WeightShards | None) -> Any:
    path, architecture = resolve_path(model), load_architecture(model)
    check_architecture(architecture, model)
    folder = model_folder(model)
    if Path(path).is_dir() or has_weights(folder):  # pickled weights of a hub model are fetched by transformers
        check_weights(folder, model.path)
    dtype = _dtype_of(architecture, model)
    try:
        with _reading(model, "cannot load it: ", attention=model.attention):
            network = load_directly(auto_class, model, path, architecture, frozen=frozen, shards=shards)
            _note_unused(network, network.unused_weights)
            return network if shards is None else network.to(shards.device)
    except NotDirectError as reason:
        _LOG.info("%s: loaded whole by transformers: %s", model.path, reason)
    network = _from_pretrained(auto_class, model, path)
    if frozen:
        network.requires_grad_(False)
        hold(network, dtype)
    if shards is not None:
        for parameter in network.parameters():
            shards.settle(parameter)
        network.to(shards.device)
    return network


def _from_pretrained(auto_class: Any, model: ModelSection, path: str) -> Any:
    with _reading(model, "cannot load it: ", attention=model.attention):
        network, report = auto_class.from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=model.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused
        )
    _check_report(network, report, model)
    return network.eval()


def _check_report(network: PreTrainedModel, report: Mapping[str, Any], model: ModelSection) -> None:
    """Check that every weight came from the files.

    `unused_weights` of the network gets the tensors that only the files have.

    Raises:
        UserError: weights are missing, of another shape, not finite, or not tied as the configuration says.
    """
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(f"model.path {model.path!r}: {name} has shape {list(found)}, expected {list(expected)} by config.json")
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers
        count = "1 weight is" if len(missing) == 1 else f"{len(missing)} weights are"
        raise UserError(f"model.path {model.path!r}: {count} not in the files, the first is {missing[0]}")
    for name, parameter in network.named_parameters():
        if not parameter.detach().sum().isfinite():
            raise UserError(f"model.path {model.path!r}: {name} holds NaN or infinite numbers")
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    tied = getattr(network.config, "tie_word_embeddings", False) and head is not None
    if tied and head.weight is not embedding.weight and head.weight.shape == embedding.weight.shape:
        raise UserError(
            f"model.path {model.path!r}: its files hold an output layer of their own, but config.json says "
            "tie_word_embeddings; set it to false there, or remove the output layer from the files"
        )
    _note_unused(network, report["unexpected_keys"])


def _note_unused(network: PreTrainedModel, names: Iterable[str]) -> None:
    """Keep the names of tensors that only the files have.

    An output layer that a trunk leaves there does not count.
    """
    head = network.get_output_embeddings()
    network.unused_weights = sorted(name for name in names if not (head is None and _HEADS.match(name)))


@contextmanager
def _reading(model: ModelSection, doing: str = "", attention: str | None = None) -> Iterator[None]:
    """Turn any error of transformers about a model's files into one line.

    Its classes range from OSError to KeyError, RuntimeError and those of safetensors, huggingface_hub and pickle.
    """
    path = resolve_path(model)
    if Path(path).is_dir():
        check_texts(Path(path), model.path)
    try:
        yield
    except (UserError, NotDirectError):
        raise
    except Exception as error:
        reason = one_line_reason(error)
        if "attention implementation" in reason:
            doing, reason = (
                "",
                f"cannot load it: this architecture has no {attention} attention; expected model.attention: eager",
            )
        raise UserError(f"model.path {model.path!r}: {doing}{reason}") from error


def _cpu_flags() -> set[str]:
    if not os.access("/proc/cpuinfo", os.R_OK):
        return set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
