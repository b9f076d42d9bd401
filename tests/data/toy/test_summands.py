"""Built-in summands: every completion adds up, digits vary, and no number is in both splits."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.toy.builtin_rows import read_builtin
from rayrlhf.data.toy.summands import generate


def numbers(rows):
    return {int(row["answer"]) for row in rows}


@given(st.integers(0, 1000), st.sampled_from(["train", "evaluation"]))
def test_every_completion_is_a_digit_and_the_rest_of_the_number(seed, split):
    for row in generate(seed, 50, split):
        digit, rest = row["completion"].split("+")
        assert digit in "123456789"
        assert int(digit) + int(rest) == int(row["answer"]) == int(row["prompt"].removesuffix("="))


def test_no_number_comes_again_before_all_came_and_then_with_other_digits():
    rows, digits = generate(0, 20 * 718, "train"), defaultdict(set)
    for start in range(0, len(rows), 718):
        assert len(numbers(rows[start : start + 718])) == 718
    for row in rows:
        digits[row["prompt"]].add(row["completion"][0])
    assert min(map(len, digits.values())) > 1


def test_no_number_is_in_both_splits_whatever_the_seeds():
    train, held_out = numbers(generate(1, 5000, "train")), numbers(generate(2, 2000, "evaluation"))
    assert not train & held_out
    assert train | held_out == set(range(100, 1000))


def test_equal_seeds_give_equal_rows_and_fewer_rows_are_the_first_of_more():
    rows, field = read_builtin("builtin:summands?seed=5", "train", None, 2000)
    assert field == "prompt"
    assert rows == generate(5, 3000, "train")[:2000] != generate(6, 2000, "train")
