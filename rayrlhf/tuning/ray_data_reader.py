"""Parallel dataset reader on Ray Data: all CPUs encode slices, the driver joins them.

A task receives the position of a slice in a file and returns the flat arrays of its samples, so no row is serialized by
itself. Samples and their order are those of a single process.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from socket import gethostname
from typing import Any, TypeVar

from rayrlhf.actors.ray_data import data_context, raise_cause
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS
from rayrlhf.config.data import PreferenceDataSection, SupervisedDataSection
from rayrlhf.data.dataset_rows import data_files
from rayrlhf.data.row_slices import RowSlice
from rayrlhf.data.supervised.datasets import SampleDataset
from rayrlhf.data.supervised.supervised_samples import PreferencePair, StepSample, SupervisedSample
from rayrlhf.errors import ActorLostError, UserError
from rayrlhf.tuning.sample_table import table_of

LARGE_BYTES = 64 * 2**20
"""Files from this size on are read through Ray Data where `data.reader` is `auto`; smaller ones are done before Ray starts."""
BUFFER_BYTES = 512 * 2**20
INDEX, SLICE, RESULT = "index", "slice", "result"

T = TypeVar("T", SupervisedSample, PreferencePair, StepSample)


def through_ray_data(data: SupervisedDataSection | PreferenceDataSection) -> bool:
    """True if Ray Data reads a run's data, by `data.reader` or file size."""
    if data.reader != "auto":
        return data.reader == "ray"
    sections = [data.train] if data.evaluation is None else [data.train, data.evaluation]
    files = [[file for file in data_files(section) if file.is_file()] for section in sections]
    return any(sum(file.stat().st_size for file in of_one) >= LARGE_BYTES for of_one in files)


def over_cluster(work: Callable[[RowSlice], SampleDataset[T]], slices: Sequence[RowSlice]) -> Iterable[SampleDataset[T]]:
    """Encode slices on all CPUs of the connected cluster; a `SliceMapper`.

    Nodes must have the files under the same paths.

    Raises:
        UserError: an error of `work`, or a node lacks a file.
        ActorLostError: Ray lost a process more often than it retries.
    """
    import ray
    import ray.data

    items = [{INDEX: index, SLICE: pickle.dumps(one)} for index, one in enumerate(slices)]
    with data_context(buffer_bytes=BUFFER_BYTES):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(partial(_encode, work=work), num_cpus=1)
        try:
            parts = _in_order((row[INDEX], row[RESULT]) for row in dataset.iter_rows())
            yield from map(_unpack, parts)
        except ray.exceptions.RayTaskError as error:
            raise_cause(error)
        except INFRASTRUCTURE_ERRORS as error:
            raise ActorLostError(f"reading the data lost its processes too often: {str(error).splitlines()[0]}") from error


def _encode(row: dict[str, Any], work: Callable[[RowSlice], SampleDataset[T]]) -> dict[str, Any]:
    """Encode one slice in a Ray Data process."""
    one: RowSlice = pickle.loads(row[SLICE])  # noqa: S301 - made by the driver
    try:
        return {INDEX: row[INDEX], RESULT: _pack(work(one))}
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: not there on the node {gethostname()}; put it where all nodes see it, or set data.reader=driver"
        ) from error


def _in_order(parts: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """Yield parts in order, each as soon as all earlier ones have arrived."""
    waiting: dict[int, bytes] = {}
    due = 0
    for index, part in parts:
        waiting[index] = part
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _pack(dataset: SampleDataset[T]) -> bytes:
    """Return samples as flat arrays, with their report and groups."""
    table = table_of(dataset.samples) if dataset.samples else None
    return pickle.dumps((table, replace(dataset, samples=[])), protocol=pickle.HIGHEST_PROTOCOL)


def _unpack(packed: bytes) -> SampleDataset[Any]:
    table, dataset = pickle.loads(packed)  # noqa: S301 - made by `_pack`
    return dataset if table is None else replace(dataset, samples=table.take(range(len(table))))
