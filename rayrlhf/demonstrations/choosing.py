"""Selection of k demonstrations from a ranking, without leaks and repeated texts.

The ranker returns more than k positions. If leaks use up the surplus, twice as many are requested, until the pool is
exhausted. Only then are fewer than k returned, and the shortfall is counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrlhf.data.words import normalized
from rayrlhf.demonstrations.example import Example, Leak, LeakRules, find_leak
from rayrlhf.demonstrations.ranking import Ranker
from rayrlhf.errors import UserError

Order = Literal["near_to_far", "far_to_near"]


@dataclass(slots=True)
class ChoiceCounts:
    """Counts of skipped candidates and shortfalls.

    Attributes:
        leaks: candidates skipped, by reason; a candidate counts once per target.
        repeated: candidates skipped because an equal text was already chosen for the target.
        short: targets with fewer demonstrations than requested.
    """

    leaks: Counter[Leak] = field(default_factory=Counter)
    repeated: int = 0
    short: int = 0


def require_pool(size: int, demonstrations: int, where: str) -> None:
    """Check that a pool has enough examples for k demonstrations.

    Raises:
        UserError: fewer examples than k.
    """
    if size < demonstrations:
        raise UserError(
            f"{where}: {size} examples cannot give {demonstrations} demonstrations, expected at least as many examples"
        )


def choose(
    targets: Sequence[Example],
    pool: Sequence[Example],
    ranker: Ranker,
    demonstrations: int,
    rules: LeakRules,
    counts: ChoiceCounts,
) -> list[list[Example]]:
    """Return up to `demonstrations` examples of the pool per target, nearest first.

    Args:
        pool: the examples that the ranker's positions index.
        counts: updated in place.
    """
    rankings = ranker.rank(targets, 2 * demonstrations + 4)
    chosen = []
    for target, ranking in zip(targets, rankings, strict=True):
        found, skipped = _walk(target, ranking, pool, demonstrations, rules)
        depth = 2 * demonstrations + 4
        while len(found) < demonstrations and len(ranking) == depth:
            depth *= 2
            [ranking] = ranker.rank([target], depth)
            found, skipped = _walk(target, ranking, pool, demonstrations, rules)
        counts.leaks.update(skipped.leaks)
        counts.repeated += skipped.repeated
        counts.short += len(found) < demonstrations
        chosen.append(found)
    return chosen


def in_order(nearest_first: Sequence[Example], order: Order) -> list[Example]:
    """Return demonstrations in context order; `far_to_near` puts the nearest next to the question."""
    return list(nearest_first) if order == "near_to_far" else list(reversed(nearest_first))


def _walk(
    target: Example, ranking: Sequence[int], pool: Sequence[Example], demonstrations: int, rules: LeakRules
) -> tuple[list[Example], ChoiceCounts]:
    found: list[Example] = []
    texts: set[str] = set()
    skipped = ChoiceCounts()
    for position in ranking:
        if len(found) == demonstrations:
            break
        candidate = pool[position]
        leak = find_leak(target, candidate, rules)
        if leak is not None:
            skipped.leaks[leak] += 1
        elif normalized(candidate.prompt) in texts:
            skipped.repeated += 1
        else:
            found.append(candidate)
            texts.add(normalized(candidate.prompt))
    return found, skipped
