"""Reference log-probs of all pairs, computed once by the initial model.

The training engine computes them before its first step and before a checkpoint is loaded, with adapters off, so no second model
is in memory. They are stored in `reference/` of the run folder, where a resumed run reads them.
"""

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rayrlhf.data.records import Float32
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.tuning.held_out import answer_logprobs
from rayrlhf.tuning.sample_table import PairTable

FOLDER = "reference"


def with_references(engine: TrainEngine, table: PairTable, folder: Path, *, adapters: bool) -> PairTable:
    """Return a table with the reference's log-probs, read from the run folder or computed.

    Every worker takes part.

    Args:
        engine: engine with the initial weights.
        table: the pairs, the same on every worker.
        folder: the run folder, visible to all workers.
        adapters: the model has adapters, which are disabled.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = folder / FOLDER / f"{zlib.crc32(table.answers.token_ids.tobytes()):08x}-{len(table)}.npy"
    found: list[Float32 | None] = [np.load(path) if torch.distributed.get_rank() == 0 and path.is_file() else None]
    torch.distributed.broadcast_object_list(found)
    references = found[0]
    if references is None:
        references = answer_logprobs(engine, table.answers.take(range(2 * len(table))), reference=adapters)
        if torch.distributed.get_rank() == 0:
            content = io.BytesIO()
            np.save(content, references)
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, content.getvalue())
    return replace(table, references=references)
