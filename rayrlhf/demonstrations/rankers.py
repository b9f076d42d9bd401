"""The ranker that a configuration asks for, over examples in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rayrlhf.config.demonstrations import SelectionSection
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.ranking import Bm25Ranker, RandomRanker, Ranker, Tasks, VectorRanker


def make_rankers(
    section: SelectionSection, targets: Sequence[Example], pool: Sequence[Example], seed: int, *, by_task: bool
) -> Callable[[int], Ranker]:
    """Return the ranker of each draw 0, 1, ...; where nothing is drawn all draws have the same.

    Args:
        section: how demonstrations are selected.
        targets: what will be asked for.
        pool: what the ranker's positions mean; may be `targets` itself.
        seed: of the run.
        by_task: whether only examples of a target's own task are named.

    Raises:
        UserError: no prompt of the pool has a word, for `bm25`; the encoder does not say how it pools, for `nearest`.
    """
    texts = [example.prompt for example in pool]
    tasks = positions_by_task(pool) if by_task else None
    if section.selection == "random":
        return lambda draw: RandomRanker(len(texts), seed + draw, tasks)
    if section.selection == "bm25":
        lexical = Bm25Ranker.build(texts, tasks=tasks)
        return lambda _: lexical
    from rayrlhf.demonstrations.encoder import Encoder

    encoder = Encoder(str(section.encoder), section.pooling)
    own = encoder.encode([target.prompt for target in targets])
    queries = {target.identity: vector for target, vector in zip(targets, own, strict=True)}
    near = VectorRanker(own if pool is targets else encoder.encode(texts), queries, tasks)
    return lambda _: near


def check_encoder(section: SelectionSection) -> None:
    """Check, without loading it, that the encoder of `nearest` says how it pools.

    Raises:
        UserError: it does not, or is not there.
    """
    from rayrlhf.config.model import ModelSection
    from rayrlhf.demonstrations.encoder import pooling_of
    from rayrlhf.models.load import resolve_path

    if section.encoder is not None and section.pooling is None:
        pooling_of(Path(resolve_path(ModelSection(path=section.encoder))))


def positions_by_task(pool: Sequence[Example]) -> Tasks:
    """Return the positions of each task."""
    positions: dict[str, list[int]] = {}
    for position, example in enumerate(pool):
        positions.setdefault(example.task, []).append(position)
    return {task: np.array(places, dtype=np.int64) for task, places in positions.items()}
