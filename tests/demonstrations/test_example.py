"""Nothing that gives an answer away stands in a context."""

import pytest

from rayrlhf.demonstrations.example import Example, Leak, LeakRules, find_leak, resemblance

LONG = "the quick brown fox jumps over the lazy dog near the old river bank today"
TARGET = Example("test:1", "How many legs has a spider?", LONG)


@pytest.mark.parametrize(
    ("candidate", "leak"),
    [
        (Example("test:1", "another text", "another"), Leak.ITSELF),
        (Example("train:1", "how many  LEGS has\na spider? ", "x"), Leak.SAME_TEXT),
        (Example("train:2", "How many legs has an ant?", LONG + "."), Leak.NEAR_ANSWER),
        (Example("train:3", "How many legs has an ant?", "six"), None),
    ],
)
def test_each_kind_of_leak_is_named(candidate: Example, leak: Leak | None) -> None:
    assert find_leak(TARGET, candidate, LeakRules()) == leak


def test_a_long_question_with_a_word_changed_at_its_end_is_a_near_duplicate() -> None:
    target, candidate = Example("a", LONG, "x"), Example("b", LONG.replace("today", "tomorrow"), "y")
    assert find_leak(target, candidate, LeakRules()) == Leak.NEAR_TEXT
    assert find_leak(target, candidate, LeakRules(resemblance=0.99)) is None


def test_short_answers_are_labels_and_may_be_equal() -> None:
    assert find_leak(Example("a", "one item", "yes"), Example("b", "other item", "yes"), LeakRules()) is None


def test_resemblance_is_the_jaccard_index_of_three_word_shingles() -> None:
    assert resemblance("a b c d", "A, b c e") == pytest.approx(1 / 3)  # {abc, bcd} and {abc, bce}.
    assert resemblance("", "!") == 1.0
    assert resemblance("a", "") == 0.0
