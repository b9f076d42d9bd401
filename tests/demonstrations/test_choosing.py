"""Demonstrations are the nearest that may be shown, in the order asked for."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rayrlhf.data.words import normalized, words_of
from rayrlhf.demonstrations.choosing import ChoiceCounts, choose, in_order, require_pool
from rayrlhf.demonstrations.example import Example, Leak, LeakRules
from rayrlhf.demonstrations.ranking import Bm25Ranker, RandomRanker, Ranker, VectorRanker
from rayrlhf.errors import UserError

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "juniper"]


def examples(count: int, seed: int, name: str = "train") -> list[Example]:
    lots = random.Random(seed)
    return [Example(f"{name}:{row}", " ".join(lots.choices(WORDS, k=5)) + f" {row}", str(row % 3)) for row in range(count)]


def vectors(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rankers(pool: list[Example]) -> list[Ranker]:
    embedded = vectors(len(pool), seed=3)
    by_identity = {example.identity: embedded[row] for row, example in enumerate(pool)}
    return [RandomRanker(len(pool), 5), Bm25Ranker.build([e.prompt for e in pool]), VectorRanker(embedded, by_identity)]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["random", "bm25", "vectors"])
def test_planted_duplicates_never_reach_a_context_with_any_ranker(which: int) -> None:
    originals = examples(40, seed=1)
    copies = [Example(f"{e.identity}:copy {n}", f"  {e.prompt.upper()}", e.answer) for e in originals for n in range(3)]
    pool = originals + copies
    counts = ChoiceCounts()
    chosen = choose(pool, pool, rankers(pool)[which], 6, LeakRules(), counts)
    for target, shown in zip(pool, chosen, strict=True):
        texts = [normalized(example.prompt) for example in shown]
        assert target.identity not in {example.identity for example in shown}
        assert normalized(target.prompt) not in texts
        assert len(set(texts)) == len(texts) == 6
    assert counts.short == 0
    assert sum(counts.leaks.values()) > 0
    if which > 0:  # The nearest of all is oneself.
        assert counts.leaks[Leak.ITSELF] == len(pool)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["random", "bm25", "vectors"])
def test_a_deeper_ranking_begins_with_the_shallower_one_and_no_position_comes_twice(which: int) -> None:
    pool = examples(50, seed=2)
    ranker = rankers(pool)[which]
    deep = ranker.rank(pool, 99)
    assert [ranking[:7] for ranking in deep] == ranker.rank(pool, 7) == [ranker.rank([one], 7)[0] for one in pool]
    assert all(sorted(ranking) == list(range(50)) for ranking in deep)


def test_random_ranks_are_uniform_and_change_with_the_seed() -> None:
    queries = examples(3000, seed=1)
    firsts = np.bincount([ranking[1] for ranking in RandomRanker(5, seed=7).rank(queries, 2)], minlength=5)
    assert np.all(np.abs(firsts - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8))
    assert RandomRanker(50, 1).rank(queries[:3], 5) != RandomRanker(50, 2).rank(queries[:3], 5)


def bm25_by_the_book(query: str, texts: Sequence[str]) -> np.ndarray:
    """BM25 as Lucene writes it (without the constant k1 + 1), straight from its formula."""
    documents = [words_of(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in words_of(query):
        containing = sum(word in document for document in documents)
        weight = np.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
        for row, document in enumerate(documents):
            frequency = document.count(word)
            scores[row] += weight * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
    return scores


def test_bm25_ranks_as_the_formula_does_also_from_a_memory_map(tmp_path: Path) -> None:
    lots = random.Random(4)
    pool = [Example(str(row), " ".join(lots.choices(WORDS, k=lots.randint(1, 12))), "x") for row in range(60)]
    texts = [example.prompt for example in pool]
    Bm25Ranker.build(texts, tmp_path)
    query = Example("query", "amber birch amber unheard", "x")
    expected = bm25_by_the_book(query.prompt, texts)
    for ranker in (Bm25Ranker.build(texts), Bm25Ranker.open(tmp_path)):
        ranking = ranker.rank([query], 60)[0]
        assert np.all(np.diff(expected[ranking]) <= 1e-5)
    assert ranker.rank([Example("q", "unheard of", "")], 3) == [[0, 1, 2]]


def test_vectors_rank_by_cosine() -> None:
    embedded = vectors(30, seed=9)
    query = vectors(1, seed=10)[0]
    ranking = VectorRanker(embedded, {"q": query}).rank([Example("q", "", "")], 30)[0]
    assert ranking == sorted(range(30), key=lambda row: -float(embedded[row] @ query))


def test_a_pool_eaten_by_leaks_gives_fewer_and_says_so() -> None:
    pool = [Example(f"train:{row}", "the same text", "x") for row in range(30)] + [Example("train:30", "another", "y")]
    counts = ChoiceCounts()
    [shown] = choose([Example("test:0", "The same text", "x")], pool, RandomRanker(31, 0), 2, LeakRules(), counts)
    assert [example.identity for example in shown] == ["train:30"]
    assert (counts.short, counts.leaks) == (1, {Leak.SAME_TEXT: 30})


def test_the_order_is_read_from_the_start_of_the_context() -> None:
    near, far = Example("near", "", ""), Example("far", "", "")
    assert in_order([near, far], "near_to_far") == [near, far]
    assert in_order([near, far], "far_to_near") == [far, near]


def test_fewer_examples_than_demonstrations_is_one_clear_line() -> None:
    require_pool(8, 8, "train.jsonl")
    with pytest.raises(UserError, match=r"train.jsonl: 7 examples cannot give 8 demonstrations"):
        require_pool(7, 8, "train.jsonl")


def test_a_pool_without_words_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="none of the 2 texts has a word"):
        Bm25Ranker.build(["", "?!"])


def test_an_opened_index_lies_in_a_memory_map_that_processes_share(tmp_path: Path) -> None:
    import bm25s

    Bm25Ranker.build([example.prompt for example in examples(20, seed=1)], tmp_path)
    opened: list[bm25s.BM25] = []
    load = bm25s.BM25.load

    def remember(*arguments: object, **options: object) -> bm25s.BM25:
        opened.append(load(*arguments, **options))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25s.BM25, "load", remember)
        Bm25Ranker.open(tmp_path)
    assert all(isinstance(opened[0].scores[part], np.memmap) for part in ("data", "indices", "indptr"))


@pytest.mark.parametrize("kind", ["random", "bm25", "vectors"])
def test_only_positions_of_the_questions_own_task_are_named(kind: str) -> None:
    texts = ["red fox", "red hen", "red cow", "red ant", "red bee", "red cat"]
    tasks = {"a": np.array([0, 2, 4]), "b": np.array([1, 3])}
    rankers: dict[str, Ranker] = {
        "random": RandomRanker(6, 0, tasks),
        "bm25": Bm25Ranker.build(texts, tasks=tasks),
        "vectors": VectorRanker(np.eye(6, dtype=np.float32), {"q": np.eye(6, dtype=np.float32)[4]}, tasks),
    }
    for task, positions in {"a": {0, 2, 4}, "b": {1, 3}, "unknown": set()}.items():
        query = Example("q", "red bee", "x", task)
        assert set(rankers[kind].rank([query], 9)[0]) == positions
        assert rankers[kind].rank([query], 1)[0] == rankers[kind].rank([query], 9)[0][:1]
    if kind != "random":
        assert rankers[kind].rank([Example("q", "red bee", "x", "a")], 1) == [[4]]


def test_a_task_without_examples_gives_none_and_says_so() -> None:
    counts = ChoiceCounts()
    pool = [Example("p:0", "red fox", "A", "a")]
    target = Example("q:0", "red hen", "B", "b")
    ranker = RandomRanker(1, 0, {"a": np.array([0])})
    assert choose([target], pool, ranker, 2, LeakRules(), counts) == [[]]
    assert counts.short == 1


@pytest.mark.parametrize("depth", [1, 7, 500])
def test_a_ranking_by_vectors_is_the_same_in_every_batch_and_that_of_all_cosines(depth: int) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(300, 48)).astype(np.float32)
    vectors[200:260] = vectors[40:100]  # ties, which go to the earlier
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = [Example(str(number), "", "") for number in range(len(vectors))]
    ranker = VectorRanker(vectors, {query.identity: vectors[number] for number, query in enumerate(queries)})
    together = ranker.rank(queries, depth)
    assert together == [ranker.rank([query], depth)[0] for query in queries]
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    for number, near in enumerate(together):
        best = np.sort(exact[number])[::-1][: len(near)]
        np.testing.assert_allclose(exact[number][near], best, atol=1e-6)
        assert len(set(near)) == min(depth, len(vectors))
    assert together[240][:2] == [80, 240][:depth]
