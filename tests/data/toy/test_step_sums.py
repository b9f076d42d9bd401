"""Built-in sums by steps: labels say which step is wrong, and no sum is in both splits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.toy.builtin_rows import read_builtin
from rayrlhf.data.toy.step_sums import generate, mistakes, solve


def is_right(step):
    terms, result = step.split("=")
    return sum(map(int, terms.split("+"))) == int(result)


@given(st.integers(0, 1000), st.sampled_from(["train", "evaluation"]), st.integers(0, 100))
def test_a_label_says_whether_its_step_is_right(seed, split, wrong):
    for row in generate(seed, 20, split, wrong):
        assert row["labels"] == [is_right(step) for step in row["completions"]]
        digits = row["prompt"].removesuffix("=").split("+")
        assert row["answer"] == str(sum(map(int, digits)))
        total = digits[0]
        for digit, step in zip(digits[1:], row["completions"], strict=True):
            assert step.startswith(f"{total}+{digit}=")
            total = step.split("=")[1]
        assert not all(row["labels"]) or total == row["answer"]


@given(st.integers(1, 60), st.integers(1, 9))
def test_a_mistake_is_a_number_that_is_not_the_sum(total, digit):
    wrong = mistakes(total, digit)
    assert len(set(wrong)) == len(wrong) >= 3
    assert total + digit not in wrong


def test_a_careful_solver_makes_no_mistake_and_a_careless_one_only_mistakes():
    assert all(solve([1, 2, 3], random.Random(0), 0)[1])
    assert not any(solve([1, 2, 3], random.Random(0), 100)[1])


def test_the_splits_share_no_sum_and_a_fifth_of_the_steps_is_wrong():
    train, evaluation = (read_builtin("builtin:step-sums", split, None, 500)[0] for split in ("train", "evaluation"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    labels = [label for row in train for label in row["labels"]]
    assert sum(labels) / len(labels) == pytest.approx(0.8, abs=0.04)
