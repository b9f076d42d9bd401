"""Spoiled demonstrations keep their form and lose or contradict the mapping."""

import random
from collections import Counter

import pytest

from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError
from rayrlhf.pipelines.icl.questions import AnswerCorruptor, copy_control

LABELS = ["red", "green", "blue", "grey"]
SHOWN = [Example(f"train:{row}", f"item {row}", LABELS[row % 4]) for row in range(400)]
TARGET = Example("test:0", "item", "red")


def test_a_flip_sends_every_label_to_another_one_by_one_rule_and_keeps_the_items() -> None:
    for seed in range(20):
        flipped = AnswerCorruptor("flip", LABELS, seed).corrupt(TARGET, SHOWN)
        rule = {(before.answer, after.answer) for before, after in zip(SHOWN, flipped, strict=True)}
        assert len(rule) == len({after for _, after in rule}) == 4
        assert all(before != after for before, after in rule)
        assert [example.prompt for example in flipped] == [example.prompt for example in SHOWN]


def test_format_only_answers_know_nothing_of_their_items() -> None:
    spoiled = AnswerCorruptor("format", [example.answer for example in SHOWN], 3).corrupt(TARGET, SHOWN)
    pairs = Counter((before.answer, after.answer) for before, after in zip(SHOWN, spoiled, strict=True))
    assert len(pairs) == 16
    assert sum((count - 25) ** 2 / 25 for count in pairs.values()) < 37.7  # 99.9 % of chi-square with 15 degrees of freedom.


def test_spoiling_depends_on_seed_target_and_demonstration_not_on_their_company() -> None:
    corruptor = AnswerCorruptor("format", LABELS, 1)
    whole = corruptor.corrupt(TARGET, SHOWN)
    shuffled = random.Random(0).sample(SHOWN, len(SHOWN))
    assert {e.identity: e.answer for e in whole} == {e.identity: e.answer for e in corruptor.corrupt(TARGET, shuffled)}
    assert whole != AnswerCorruptor("format", LABELS, 2).corrupt(TARGET, SHOWN)
    assert whole != corruptor.corrupt(Example("test:1", "item", "red"), SHOWN)


def test_without_ablation_nothing_changes_even_with_one_answer() -> None:
    assert AnswerCorruptor("none", ["x"], 0).corrupt(TARGET, SHOWN) == SHOWN


def test_one_answer_cannot_be_spoiled() -> None:
    with pytest.raises(UserError, match="ablation flip: the pool has 1 different answers, expected at least 2"):
        AnswerCorruptor("flip", ["x", "x"], 0)


def test_the_copying_control_expects_the_share_of_the_right_answer() -> None:
    assert copy_control(SHOWN[:5], "red") == pytest.approx(2 / 5)
    assert copy_control([], "red") == 0.0
