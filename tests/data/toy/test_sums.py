"""Built-in sums: right answers, wrong mistakes, splits that share no sum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.toy.sums import generate, generate_pairs, mistakes


def numbers(prompt):
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


@given(st.integers(0, 1000), st.sampled_from(["train", "evaluation"]))
def test_every_completion_is_the_sum(seed, split):
    for row in generate(seed, 50, split):
        assert row["completion"] == row["answer"] == str(sum(numbers(row["prompt"])))


@given(st.integers(10, 99), st.integers(10, 99))
def test_a_mistake_is_a_number_that_is_not_the_sum_and_comes_once(left, right):
    wrong = mistakes(left, right)
    assert len(set(wrong)) == len(wrong) >= 10
    assert all(text.isdecimal() and text != str(left + right) for text in wrong)


def test_pairs_prefer_the_sum_to_a_mistake():
    for row in generate_pairs(0, 200, "train"):
        assert row["chosen"] == str(sum(numbers(row["prompt"])))
        assert row["rejected"] in mistakes(*numbers(row["prompt"]))


def test_careless_demonstrations_drop_carries_and_nothing_else():
    rows = generate(0, 4000, "train", careless=60)
    carrying = [row for row in rows if sum(number % 10 for number in numbers(row["prompt"])) >= 10]
    dropped = [row for row in rows if row["completion"] != row["answer"]]
    assert all(row["answer"] == str(sum(numbers(row["prompt"]))) for row in rows)
    assert all(int(row["completion"]) == int(row["answer"]) - 10 for row in dropped)
    assert all(row in carrying for row in dropped)
    assert len(dropped) / len(carrying) == pytest.approx(0.6, abs=0.03)


def test_pairs_of_careless_learners_have_the_dropped_carry_as_their_mistake():
    rows = generate_pairs(0, 4000, "train", careless=50)
    carrying = [row for row in rows if sum(number % 10 for number in numbers(row["prompt"])) >= 10]
    dropped = [row for row in carrying if int(row["rejected"]) == int(row["chosen"]) - 10]
    assert len(dropped) / len(carrying) == pytest.approx(0.5 + 0.5 / 15, abs=0.03)
    assert all(row["rejected"] in mistakes(*numbers(row["prompt"])) for row in rows)


def test_no_sum_is_in_both_splits_whatever_the_seeds():
    train = {row["prompt"] for row in generate(1, 20_000, "train")} | {
        row["prompt"] for row in generate_pairs(2, 9000, "train")
    }
    held_out = {row["prompt"] for row in generate(3, 5000, "evaluation")}
    assert not train & held_out
    assert len(train) + len(held_out) == 90 * 90


@pytest.mark.parametrize("make", [generate, generate_pairs])
def test_equal_seeds_give_equal_rows_and_fewer_rows_are_the_first_of_more(make):
    assert make(5, 40, "train") == make(5, 40, "train")
    assert make(5, 10, "train") == make(5, 40, "train")[:10]
    assert make(5, 40, "train") != make(6, 40, "train")
