"""Words, classes and labels of the mapping tasks."""

import pytest

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import read_rows
from rayrlhf.data.toy.mappings import ENDINGS, LABELS, LETTERS, MAX_TASKS, ROWS_PER_TASK, generate, mappings, words
from rayrlhf.errors import UserError


def _class(word: str) -> int:
    assert len(word) == 3
    assert set(word[:2]) <= set(LETTERS)
    return ENDINGS.index(word[2])


def test_a_task_gives_each_class_a_label_of_its_own_and_keeps_to_it() -> None:
    for row in generate(seed=0, count=240, split="train"):
        assert row["completion"] == row["answer"] == row["task"][_class(row["prompt"])]
        assert len(set(row["task"])) == len(ENDINGS)
        assert set(row["task"]) <= set(LABELS)


def test_no_word_and_no_task_is_on_both_sides_and_none_is_lost() -> None:
    for number in range(len(ENDINGS)):
        sides = [set(words("train")[number]), set(words("evaluation")[number])]
        assert not sides[0] & sides[1]
        assert len(sides[0] | sides[1]) == len(LETTERS) ** 2
    train, evaluation = set(mappings("train")), set(mappings("evaluation"))
    assert not train & evaluation
    assert len(train | evaluation) == 8 * 7 * 6 * 5
    assert len(evaluation) >= MAX_TASKS
    rows = {split: generate(seed=3, count=4800, split=split) for split in ("train", "evaluation")}  # type: ignore[arg-type]
    for field in ("prompt", "task"):
        assert not {row[field] for row in rows["train"]} & {row[field] for row in rows["evaluation"]}


def test_rows_of_a_task_stand_together_with_different_words() -> None:
    rows = generate(seed=1, count=10 * ROWS_PER_TASK, split="evaluation")
    for start in range(0, len(rows), ROWS_PER_TASK):
        part = rows[start : start + ROWS_PER_TASK]
        assert len({row["task"] for row in part}) == 1
        assert len({row["prompt"] for row in part}) == ROWS_PER_TASK


def test_labels_say_nothing_without_the_task() -> None:
    rows = generate(seed=2, count=24_000, split="train")
    for number in range(len(ENDINGS)):
        of_class = [row["answer"] for row in rows if _class(row["prompt"]) == number]
        most = max(of_class.count(label) for label in LABELS) / len(of_class)
        assert most < 0.18  # 1 / 8 is what guessing gives.


def test_equal_arguments_give_equal_rows_and_a_smaller_count_the_first_of_them() -> None:
    rows = generate(seed=5, count=100, split="train")
    assert generate(seed=5, count=100, split="train") == rows
    assert generate(seed=5, count=30, split="train") == rows[:30]
    assert generate(seed=6, count=100, split="train") != rows


def test_one_task_is_held_out_from_training_and_has_words_on_both_sides() -> None:
    train, evaluation = (generate(seed=0, count=96, split=split, task=4) for split in ("train", "evaluation"))
    assert {row["task"] for row in train} == {row["task"] for row in evaluation} == {mappings("evaluation")[3]}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}


def test_the_dataset_is_read_by_name() -> None:
    rows = read_rows(DatasetSection(path="builtin:mappings?seed=2&task=7&count=5", split="evaluation"))
    assert rows.values == generate(seed=2, count=5, split="evaluation", task=7)
    with pytest.raises(UserError, match="task: expected at most 200, found 201"):
        read_rows(DatasetSection(path="builtin:mappings?task=201"))
