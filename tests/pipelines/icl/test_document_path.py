"""A path visits each document once, keeps related ones together, and loses no token when it is cut."""

import itertools
import random

import pytest

from rayrlhf.demonstrations.example import LeakRules
from rayrlhf.pipelines.icl.document_path import Piece, are_near_duplicates, cut, duplicates_to_drop, random_order, related_order

LONG = "the quick brown fox jumps over the lazy dog near the old river bank today"


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_visited_once_in_any_graph(seed: int) -> None:
    lots = random.Random(seed)
    neighbors = [lots.sample(range(50), lots.randint(0, 6)) for _ in range(50)]
    without = frozenset(lots.sample(range(50), 7))
    expected = sorted(set(range(50)) - without)
    assert sorted(related_order(neighbors, without)) == expected
    assert sorted(random_order(50, seed, without)) == expected


def test_topics_stay_together_where_chance_mixes_them() -> None:
    topic = [document % 5 for document in range(100)]
    neighbors = [[other for other in range(100) if topic[other] == topic[one] and other != one] for one in range(100)]

    def changes(order: list[int]) -> int:
        return sum(topic[a] != topic[b] for a, b in itertools.pairwise(order))

    assert changes(related_order(neighbors)) == 4
    assert changes(random_order(100, seed=1)) > 50


def test_the_path_begins_where_neighbours_are_fewest_and_takes_the_nearest_next() -> None:
    # A star around 0 with a tail 0 - 4 - 5: the end of a ray comes first, then 0's nearest.
    assert related_order([[4, 2, 3, 1], [0], [0], [0], [5], []]) == [1, 0, 4, 5, 2, 3]


@pytest.mark.parametrize(
    ("first", "second", "rules", "near"),
    [
        ("short", "Short!", LeakRules(), True),
        ("short", "another short", LeakRules(), False),
        (LONG, LONG.replace("today", "now"), LeakRules(), True),
        (LONG, LONG.replace("today", "now"), LeakRules(resemblance=0.99), False),
        (LONG, LONG.replace("today", "now"), LeakRules(words=100), False),
    ],
)
def test_near_duplicates_share_their_words_or_nearly_all_of_them(first: str, second: str, rules: LeakRules, near: bool) -> None:
    assert are_near_duplicates(first, second, rules) is near


def test_of_near_duplicates_the_earliest_stays() -> None:
    # 4 is near 3 alone, which is left out for 1: so 4 stays.
    assert duplicates_to_drop([(2, 0), (0, 2), (3, 1), (4, 3), (4, 4)]) == {2: 0, 3: 1}


@pytest.mark.parametrize("seed", range(10))
def test_cutting_loses_and_doubles_no_token_and_fills_every_context_but_the_last(seed: int) -> None:
    lots = random.Random(seed)
    lengths = [lots.choice([0, 1, 3, 9, 40]) for _ in range(30)]
    order = random_order(30, seed)
    contexts = cut(order, lengths, 16)
    tokens = [(piece.document, token) for pieces in contexts for piece in pieces for token in range(piece.start, piece.stop)]
    assert tokens == [(document, token) for document in order for token in range(lengths[document])]
    sizes = [sum(piece.stop - piece.start for piece in pieces) for pieces in contexts]
    assert all(size == 16 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 16
    assert all(piece.start < piece.stop for pieces in contexts for piece in pieces)


def test_empty_documents_leave_no_piece_and_no_context() -> None:
    assert cut([0, 1], [0, 2], 4) == [[Piece(1, 0, 2)]]
    assert cut([0], [0], 4) == []
