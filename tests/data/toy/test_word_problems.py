"""Built-in word problems: right answers, short texts, splits that share no sum."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.toy import word_problems
from rayrlhf.data.toy.word_problems import NAMES, TEMPLATES, THINGS, generate
from rayrlhf.errors import UserError

NUMBER = re.compile(r"\d+")


def solve(question: str) -> int:
    """An independent solver that reads the words, not the templates' functions."""
    numbers = [int(n) for n in NUMBER.findall(question)]
    x, y = numbers[:2]
    if ("buys" in question and "packs" not in question) or "find together" in question:
        return x + y
    if "loose" in question:
        return x * y + numbers[2]
    if "packs" in question:
        return x * y - numbers[2]
    if "then got" in question:
        return x - y + numbers[2]
    if "A shop" in question:
        return x - y - numbers[2]
    if "more than" in question:
        return x + (x + y)
    if "each pick" in question:
        return x + x - y
    if "boxes" in question or "friends" in question:
        return x * y
    return x - y


def skeleton(question: str) -> str:
    """The problem without its names and things: template and numbers."""
    for word in (*NAMES, *THINGS):
        question = re.sub(rf"\b{word}\b", "_", question)
    return question


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_answers_are_right_and_not_negative(split):
    rows = generate(0, 2000, split)
    for row in rows:
        assert set(row) == {"question", "answer", "solution"}
        assert int(row["answer"]) == solve(row["question"]) >= 0
        working, _, rest = row["solution"].partition(" = ")
        assert eval(working) == int(row["answer"])
        assert rest.endswith(f"Answer: {row['answer']}")
    assert len({row["question"] for row in rows}) == 2000


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_no_sum_of_the_evaluation_split_is_trained_on_whatever_the_seeds(one, two):
    train = {skeleton(row["question"]) for row in generate(one, 300, "train")}
    assert train.isdisjoint(skeleton(row["question"]) for row in generate(two, 300, "evaluation"))


def test_every_template_occurs_with_its_own_words():
    kinds = {NUMBER.sub("#", skeleton(row["question"])) for row in generate(1, 1000, "train")}
    assert len(kinds) == len(TEMPLATES)
    assert {NUMBER.sub("#", skeleton(row["question"])) for row in generate(1, 1000, "evaluation")} == kinds


def test_the_same_seed_gives_the_same_problems_and_a_larger_count_extends_them():
    assert generate(3, 50, "train") == generate(3, 80, "train")[:50]
    assert generate(3, 50, "train") != generate(4, 50, "train")


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_one_operation_leaves_half_of_the_templates(split):
    rows = generate(0, 2000, split, operations=1)
    assert all(len(row["solution"].partition(" = ")[0].split()) == 3 for row in rows)
    assert len({NUMBER.sub("#", skeleton(row["question"])) for row in rows}) == len(TEMPLATES) // 2
    assert generate(0, 50, split, operations=2, largest=20) == generate(0, 50, split)


def test_no_number_of_a_text_is_above_the_largest():
    rows = generate(0, 2000, "train", largest=5)
    assert {int(number) for row in rows for number in NUMBER.findall(row["question"])} == {2, 3, 4, 5}


@pytest.mark.parametrize(("largest", "count"), [(1, 1), (2, 400)])
def test_more_problems_than_there_are_is_one_line(monkeypatch, largest, count):
    monkeypatch.setattr(word_problems, "NAMES", NAMES[:2])
    monkeypatch.setattr(word_problems, "THINGS", THINGS[:2])
    with pytest.raises(UserError, match=rf"expected count=\d+ or less .* found count={count}"):
        generate(0, count, "train", largest=largest)


def test_problems_are_short():
    lengths = [len(re.findall(r"\w+|[^\w\s]", row["question"])) for row in generate(0, 1000, "train")]
    assert min(lengths) >= 14
    assert max(lengths) <= 30


def test_the_largest_count_is_possible_for_both_splits():
    assert len(generate(0, 20_000, "evaluation", operations=1)) == 20_000


@pytest.mark.parametrize(("count", "split"), [(-1, "train"), (20_001, "train"), (5, "test")])
def test_senseless_arguments_are_refused(count, split):
    with pytest.raises(ValueError, match="expected"):
        generate(0, count, split)
