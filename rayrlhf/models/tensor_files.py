"""Writing of safetensors files whose tensors are computed one at a time.

The sizes are known before the first tensor, so the header and the index are written first, and each tensor goes to its place in
the file as it comes. No more than one tensor is held.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

FILE_BYTES = 50 * 10**9
"""Largest file; transformers' default. A larger tensor has a file of its own."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Shape and dtype of a tensor that is not computed yet."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorStream:
    """Named tensors that are computed one at a time.

    Attributes:
        kinds: shape and dtype of each, in the order of `tensors`.
        tensors: name and value; each value is valid until the next.
    """

    kinds: Mapping[str, TensorKind]
    tensors: Iterable[tuple[str, Tensor]]

    def renamed(self, prefix: str, **more: Tensor) -> "TensorStream":
        """Return the stream with a prefix before every name.

        Further tensors follow it under their full names.
        """

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors:
                yield f"{prefix}{name}", tensor
            yield from more.items()

        kinds = {f"{prefix}{name}": kind for name, kind in self.kinds.items()}
        return TensorStream(kinds | {name: TensorKind(one.shape, one.dtype) for name, one in more.items()}, tensors())


def write_stream(folder: Path, stream: TensorStream, *, file_bytes: int = FILE_BYTES) -> None:
    """Write `model.safetensors`, or several files and their index, into a folder.

    Raises:
        ValueError: the tensors are not those of `stream.kinds`.
        OSError: the disk is full or not writable.
    """
    groups = list(_groups(stream.kinds, file_bytes))
    several = len(groups) > 1
    paths = [
        folder / (f"model-{index:05}-of-{len(groups):05}.safetensors" if several else "model.safetensors")
        for index in range(1, len(groups) + 1)
    ]
    tensors = iter(stream.tensors)
    for path, kinds in zip(paths, groups, strict=True):
        _write_file(path, kinds, tensors)
    if next(tensors, None) is not None:
        raise ValueError("more tensors than kinds")
    if several:
        total = sum(kind.nbytes for kind in stream.kinds.values())
        where = {name: path.name for path, kinds in zip(paths, groups, strict=True) for name in kinds}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups(kinds: Mapping[str, TensorKind], file_bytes: int) -> Iterator[dict[str, TensorKind]]:
    group: dict[str, TensorKind] = {}
    size = 0
    for name, kind in kinds.items():
        if group and size + kind.nbytes > file_bytes:
            yield group
            group, size = {}, 0
        group[name] = kind
        size += kind.nbytes
    yield group


def _write_file(path: Path, kinds: Mapping[str, TensorKind], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file; the wider dtypes lie first, so that every tensor is aligned."""
    places: dict[str, int] = {}
    end = 0
    for name in sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize):
        places[name] = end
        end += kinds[name].nbytes
    entries = {
        name: {
            "dtype": _NAMES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [places[name], places[name] + kind.nbytes],
        }
        for name, kind in kinds.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for expected in kinds:
            # Nothing here may outlive the write: the next tensor is computed meanwhile.
            _write_tensor(file, expected, kinds[expected], 8 + len(header) + places[expected], next(tensors, None))
        file.truncate(8 + len(header) + end)


def _write_tensor(file: BinaryIO, name: str, kind: TensorKind, place: int, found: tuple[str, Tensor] | None) -> None:
    if found is None or found[0] != name or TensorKind(found[1].shape, found[1].dtype) != kind:
        raise ValueError(f"{name}: expected {tuple(kind.shape)} of {kind.dtype}, not {found and found[0]}")
    file.seek(place)
    file.write(found[1].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
