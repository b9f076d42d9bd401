"""From a ranking to demonstrations: walk from the nearest on, pass over what leaks, count why, stop at k.

The ranker is asked for somewhat more than k; where leaks eat the surplus it is asked for twice as many, until the pool is
exhausted. Fewer than k are returned only then, and the shortfall is counted rather than hidden.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrlhf.demonstrations.example import Example, normalized
from rayrlhf.demonstrations.leaks import Leak, LeakRules, find_leak
from rayrlhf.demonstrations.ranking import Ranker
from rayrlhf.errors import UserError

Order = Literal["near_to_far", "far_to_near"]


@dataclass(slots=True)
class ChoiceCounts:
    """What happened while choosing.

    Attributes:
        leaks: candidates passed over, by reason; a candidate counts once for each target it was nearest to.
        repeated: candidates passed over since an equal text was already chosen for the same target.
        short: targets that got fewer demonstrations than asked for.
    """

    leaks: Counter[Leak] = field(default_factory=Counter)
    repeated: int = 0
    short: int = 0


def require_pool(size: int, demonstrations: int, where: str) -> None:
    """Check that a pool can serve k demonstrations and still leave out the target itself.

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
    """Return up to `demonstrations` examples of the pool for each target, the nearest first.

    Args:
        targets: what the demonstrations are for.
        pool: what the ranker's positions mean.
        ranker: who is near.
        demonstrations: k.
        rules: what counts as a leak.
        counts: is added to.
    """
    rankings = ranker.rank(targets, 2 * demonstrations + 4)
    chosen = []
    for target, ranking in zip(targets, rankings, strict=True):
        found, passed = _walk(target, ranking, pool, demonstrations, rules)
        depth = 2 * demonstrations + 4
        while len(found) < demonstrations and len(ranking) == depth:
            depth *= 2
            [ranking] = ranker.rank([target], depth)
            found, passed = _walk(target, ranking, pool, demonstrations, rules)
        counts.leaks.update(passed.leaks)
        counts.repeated += passed.repeated
        counts.short += len(found) < demonstrations
        chosen.append(found)
    return chosen


def in_order(nearest_first: Sequence[Example], order: Order) -> list[Example]:
    """Return demonstrations as the context shows them; `far_to_near` puts the nearest beside the question."""
    return list(nearest_first) if order == "near_to_far" else list(reversed(nearest_first))


def _walk(
    target: Example, ranking: Sequence[int], pool: Sequence[Example], demonstrations: int, rules: LeakRules
) -> tuple[list[Example], ChoiceCounts]:
    found: list[Example] = []
    texts: set[str] = set()
    passed = ChoiceCounts()
    for position in ranking:
        if len(found) == demonstrations:
            break
        candidate = pool[position]
        leak = find_leak(target, candidate, rules)
        if leak is not None:
            passed.leaks[leak] += 1
        elif normalized(candidate.prompt) in texts:
            passed.repeated += 1
        else:
            found.append(candidate)
            texts.add(normalized(candidate.prompt))
    return found, passed
