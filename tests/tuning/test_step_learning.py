"""A tiny process reward model finds wrong steps of unseen sums, and chooses answers better than a vote does."""

import random
from collections import Counter

import numpy as np
import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig
from rayrlhf.data.toy.step_sums import generate, solve
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.pipelines.evaluation.evaluate_model import best_of
from rayrlhf.tuning.train_model import train_reward, train_sft
from tests.tuning.runs import write_rows

pytestmark = pytest.mark.nightly
COMMON = [
    "model.dtype=float32", "data.chat=false", "data.max_length=128", "train.batch_size=64", "train.schedule.shape=cosine",
    "train.schedule.warmup_steps=50", "checkpoint.every=0", "observe.live=false", "observe.tensorboard=false",
]  # fmt: skip
SAMPLES = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cluster):
    """A model that has learned to add, then to tell right steps from wrong ones."""
    folder = tmp_path_factory.mktemp("sums")
    solved = [row for row in generate(0, 20_000, "train", 1) if all(row["labels"])]
    texts = [{"prompt": row["prompt"], "completion": "\n".join([*row["completions"], ""])} for row in solved]
    path = write_rows(folder / "solved.jsonl", texts)
    model = "model.path=builtin:tiny?layers=2&hidden=128&context=128"
    own = [model, f"data.train.path={path}", "train.learning_rate=2e-3", "train.steps=700", f"run.root={folder / 'sft'}"]
    adds = train_sft(load_config(SFTConfig, None, [*COMMON, *own])).export
    own = [
        "kind=process", f"model.path={adds}", "data.train.path=builtin:step-sums?wrong=50",
        "data.evaluation.path=builtin:step-sums?count=300", "data.evaluation.split=evaluation",
        "train.learning_rate=1e-3", "train.steps=1600", f"run.root={folder / 'reward'}",
    ]  # fmt: skip
    return train_reward(load_config(RewardTrainingConfig, None, [*COMMON, *own]))


def test_nine_of_ten_steps_of_unseen_sums_are_told_right_from_wrong(trained):
    print({name: value for name, value in trained.metrics.items() if "accuracy" in name})
    assert trained.metrics["evaluation/accuracy"] >= 0.9
    assert trained.metrics["evaluation/wrong_step_accuracy"] >= 0.9


# Percent of the solver's steps that are wrong, independently, with the mistakes of the dataset.
@pytest.mark.parametrize("careless", [20, 30, 40])
@pytest.mark.parametrize("aggregate", ["min", "product"])
def test_the_best_of_eight_is_five_points_better_than_the_vote(trained, aggregate, careless):
    rows, draw = generate(1, 300, "evaluation"), random.Random("answers")
    terms = [list(map(int, row["prompt"].removesuffix("=").split("+"))) for row in rows]
    solutions = [[solve(digits, draw, careless)[0] for _ in range(SAMPLES)] for digits in terms]
    answers = [[int(steps[-1].rpartition("=")[2]) for steps in row] for row in solutions]
    right = np.array([[answer == sum(digits) for answer in row] for row, digits in zip(answers, terms, strict=True)])
    vote = np.mean([Counter(row).most_common(1)[0][0] == sum(digits) for row, digits in zip(answers, terms, strict=True)])

    model = {"model": {"path": str(trained.export), "dtype": "float32"}, "steps": {"aggregate": aggregate}}
    responses = ["\n".join(steps) for row in solutions for steps in row]
    prompts = [row["prompt"] for row in rows for _ in range(SAMPLES)]
    chosen_by = RewardEnsemble(RewardModelSection.model_validate(model)).score(prompts, responses).reshape(-1, SAMPLES)
    best = best_of(right, SAMPLES, chosen_by=chosen_by).mean()
    print(f"{careless} % wrong, {aggregate}: one {right.mean():.3f}, vote {vote:.3f}, best {best:.3f}")
    assert best >= vote + 0.05
