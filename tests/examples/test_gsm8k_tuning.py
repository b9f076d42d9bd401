"""The GSM8K examples of SFT and reward modelling: pairs of right and wrong solutions, and configurations that fit."""

import json
from pathlib import Path

import pytest

from examples.gsm8k.make_pairs import make_pairs
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig
from rayrlhf.data.holdout import held_out
from rayrlhf.errors import UserError
from rayrlhf.tuning.train_model import check_reward, check_sft

FOLDER = Path(__file__).parents[2] / "examples" / "gsm8k"


def solution(text, correct):
    return {"solution": text, "is_correct": correct}


def write_solutions(path, questions):
    rows = [
        {
            "question": f"What is {number} + 1?",
            "ground_truth": "A: 0",
            "small": solution(f"A: {number + 1}", True),
            "small_again": solution(f"A: {number + 1}", True),
            "large": solution("A: nothing", False),
            "larger": solution("A: much", False) if number % 2 else solution(f"So A: {number + 1}", True),
        }
        for number in range(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_right_solution_meets_each_wrong_one_of_its_question_once(tmp_path):
    count = make_pairs(write_solutions(tmp_path / "solutions.jsonl", 2), tmp_path / "made" / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "made" / "pairs.jsonl").read_text().splitlines()]
    assert count == len(pairs)
    assert pairs == [
        {"prompt": "What is 0 + 1?", "chosen": "A: 1", "rejected": "A: nothing"},
        {"prompt": "What is 0 + 1?", "chosen": "So A: 1", "rejected": "A: nothing"},
        {"prompt": "What is 1 + 1?", "chosen": "A: 2", "rejected": "A: nothing"},
        {"prompt": "What is 1 + 1?", "chosen": "A: 2", "rejected": "A: much"},
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"large": {"is_correct": true, "solution": "x"}, "a": {"is_correct": false}}'])
def test_a_row_of_another_kind_is_named(line, tmp_path):
    (tmp_path / "solutions.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"solutions\.jsonl: row 1: expected a question"):
        make_pairs(tmp_path / "solutions.jsonl", tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_the_reward_example_keeps_the_pairs_of_one_question_on_one_side(tmp_path):
    make_pairs(write_solutions(tmp_path / "solutions.jsonl", 60), tmp_path / "pairs.jsonl")
    own = [f"data.train.path={tmp_path / 'pairs.jsonl'}", "model={path: 'builtin:tiny'}"]
    config = load_config(RewardTrainingConfig, FOLDER / "reward.yaml", own)
    plan = check_reward(config)
    questions = [json.loads(line)["prompt"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    out = held_out(questions, config.data.evaluation_share)
    assert not {question for question, is_out in zip(questions, out, strict=True) if is_out} & {
        question for question, is_out in zip(questions, out, strict=True) if not is_out
    }
    assert f"held out for evaluation: {sum(out)}" in plan
    assert "length rule: preferring the shorter answer" in plan


def test_the_sft_example_fits_rows_of_gsm8k(tmp_path):
    rows = [{"question": f"{number} + 1?", "answer": f"<<{number}+1={number + 1}>>\n#### {number + 1}"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = f"data.train={{path: {tmp_path / 'train.jsonl'}, prompt_field: question, completion_field: answer}}"
    plan = check_sft(load_config(SFTConfig, FOLDER / "sft.yaml", [local, "model={path: 'builtin:tiny'}"]))
    assert "optimizer steps: 120" in plan
