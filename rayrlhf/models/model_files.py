"""Checks of the files of a model folder, without reading weights."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrlhf.data.messages import short
from rayrlhf.data.row_files import check_file
from rayrlhf.errors import UserError

ADAPTERS = "adapter_config.json"
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_TEXTS = (*_OBJECTS, "tokenizer.json", "tokenizer.model", "chat_template.jinja")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}


def check_texts(folder: Path, path: str) -> None:
    """Check configuration and tokenizer files of a model folder.

    Args:
        folder: of the model.
        path: `model.path`, for the message.

    Raises:
        UserError: one is a Git LFS pointer or no JSON object, or a special token has no row in the model's embedding.
    """
    found = {}
    for name in _TEXTS:
        file = folder / name
        if not file.is_file():
            continue
        _refuse_pointer(file, path)
        if name in _OBJECTS:
            found[name] = _json_object(file, path)
    longest = found.get("tokenizer_config.json", {}).get("model_max_length")
    if not isinstance(longest, int | float | None):
        raise UserError(f"model.path {path!r}: tokenizer_config.json: model_max_length {short(longest)}, expected a number")
    config = found.get("config.json", {})
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    if text is not None:  # multimodal models have ids of their processors there
        found.pop("config.json")
    for name in ("config.json", "generation_config.json"):
        for key in SPECIAL_TOKENS:
            # Ids of others may lie beyond the vocabulary: published models kept GPT-2's 50256, which nothing then samples.
            bound = rows if type(rows) is int and (name, key) == ("config.json", "pad_token_id") else None
            special_tokens(found.get(name, {}), key, f"model.path {path!r}: {name}", bound)


def special_tokens(values: Mapping[str, Any], key: str, where: str, rows: int | None = None) -> list[int]:
    """Return the ids of a special token of a configuration; several only of the end.

    -1, which older configurations have, is none.

    Args:
        values: of the configuration.
        key: of the token, one of `SPECIAL_TOKENS`.
        where: file, for the message.
        rows: of the model's embedding; None for unknown.

    Raises:
        UserError: anything else than ids of the embedding's rows.
    """
    value = values.get(key)
    end = key == "eos_token_id"
    if value is None or value == -1:
        return []
    ids = value if end and isinstance(value, list) else [value]
    if all(type(one) is int and 0 <= one < (rows or one + 1) for one in ids):
        return ids
    wanted = "a token id or a list of them" if end else "a token id"
    limits = "from 0" if rows is None else f"from 0 to {rows - 1}, the last row of the model's embedding"
    raise UserError(f"{where}: {key} {short(value)}, expected {wanted}, {limits}")


def check_weights(folder: Path, path: str, *, quantized: bool = False) -> int:
    """Check that the weight files of a model folder are there and whole.

    Args:
        folder: of the model.
        path: `model.path`, for the message.
        quantized: quantized weights are allowed.

    Returns:
        Their size in bytes.

    Raises:
        UserError: there are none, one is missing, cut or a Git LFS pointer, weights are quantized, or the folder has adapters
            next to them; see also `check_texts`.
    """
    if (folder / ADAPTERS).is_file():
        raise UserError(
            f"model.path {path!r}: the folder has adapters ({ADAPTERS}) next to a model; merge them into it, or move them away"
        )
    check_texts(folder, path)  # of a hub model they are not checked elsewhere
    files = _weight_files(folder, path)
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path {path!r}: {file.name} is missing, which the index of the weights names; fetch it")
        _refuse_pointer(file, path)
        if file.suffix == ".safetensors":
            _check_safetensors(file, path, quantized=quantized)
        elif file.stat().st_size == 0:
            raise UserError(f"model.path {path!r}: {file.name} is empty; fetch it again")
    return sum(file.stat().st_size for file in files)


def has_weights(folder: Path) -> bool:
    """Return True if all weight files of a model folder are there."""
    try:
        return all(file.is_file() for file in _weight_files(folder, str(folder)))
    except UserError:
        return False


def stored_dtype(folder: Path) -> str | None:
    """Return the float type of most weights, by its name in safetensors.

    None without safetensors files.
    """
    sizes: Counter[str] = Counter()
    for file in _weight_files(folder, str(folder)) if has_weights(folder) else ():
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            for name, facts in header.items():
                if name != "__metadata__" and str(facts["dtype"]).startswith(("F", "BF")):
                    start, end = facts["data_offsets"]
                    sizes[facts["dtype"]] += end - start
    return sizes.most_common(1)[0][0] if sizes else None


def _weight_files(folder: Path, path: str) -> list[Path]:
    """Return the files that transformers reads, in its order of precedence."""
    for name in (_SAFE, _PICKLED):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return [file]
        if index.is_file():
            _refuse_pointer(index, path)
            places = _json_object(index, path).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise UserError(f"model.path {path!r}: {index.name} has no weight_map; fetch it again")
            return [folder / str(one) for one in dict.fromkeys(places.values())]
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt"))
    found = f", only {', '.join(others[:3])}" if others else ""
    raise UserError(f"model.path {path!r}: the folder has no {_SAFE} or {_PICKLED}, nor an index of their parts{found}")


def _refuse_pointer(file: Path, path: str) -> None:
    check_file(f"model.path {path!r}: {file.name}", file)


def _json_object(file: Path, path: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path!r}: {file.name} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"model.path {path!r}: {file.name}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_safetensors(file: Path, path: str, *, quantized: bool) -> None:
    size = file.stat().st_size
    where = f"model.path {path!r}: {file.name}"
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if 0 < length <= size - 8 else None
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"} if header else {}
        end = max(facts["data_offsets"][1] for facts in tensors.values())
        dtypes = {name: str(facts["dtype"]) for name, facts in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: damaged or cut, its header cannot be read; fetch it again") from error
    if size != 8 + length + end:
        raise UserError(f"{where}: {size} bytes, expected {8 + length + end} by its header; fetch it again")
    for name, dtype in () if quantized else dtypes.items():
        if dtype.startswith(("F8_", "F6_", "F4")) or (name.endswith(".weight") and dtype in _WHOLE_NUMBERS):
            raise UserError(f"{where}: {name} is stored as {dtype}: expected a checkpoint that is not quantized")
