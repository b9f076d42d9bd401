"""An evaluation with an environment: real turns of a real engine, scored by what the environment paid, and kept by speaker."""

import asyncio

import numpy as np
import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.data.records import Prompt
from rayrlhf.environments.guessing import Guessing
from rayrlhf.environments.protocol import Action
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.observe.samples import read_samples
from rayrlhf.pipelines.evaluation.evaluate_model import ANSWERS, check_evaluation, evaluate_model, read_result
from tests.environments.sample_players import Echo

SETTINGS = [
    "model.path=builtin:tiny?layers=1&hidden=64&context=64",
    "model.dtype=float32",
    "data.path=builtin:sums?count=8",
    "data.split=evaluation",
    "data.chat=false",
    "reward.functions=[{name: environment}]",
    "rollout.backend=transformers",
    "rollout.max_new_tokens=12",
]
GAME = "environment={name: guessing, arguments: {column: answer}, max_turns: 3, max_turn_tokens: 2}"
MODULE = "tests.pipelines.evaluation.test_transcript_samples"


class Picky(Echo):
    """Cannot be played for one of eight prompts."""

    async def reset(self, prompt, seed):
        if prompt.id == 3:
            raise RuntimeError("not this one")
        return ""


def config(folder, *overrides):
    return load_config(EvaluateConfig, None, [*SETTINGS, f"run.root={folder}", *overrides])


async def replayed(row, said):
    """What another game answers and pays when it hears the same turns."""
    game = Guessing(column="answer")
    await game.reset(Prompt(0, "", np.zeros(1, np.int32), {"answer": row}), 0)
    return [await game.step(Action(text, np.zeros(1, np.int32))) for text in said]


def test_the_score_is_the_episodes_and_the_transcript_tells_who_said_what(tmp_path):
    result = evaluate_model(config(tmp_path, GAME, "temperature=1.0", "samples=2"))
    answers = read_samples(result.folder / ANSWERS)
    assert [(row["prompt_id"], row["sample"]) for row in answers] == [(prompt, at) for prompt in range(8) for at in range(2)]
    for row in answers:
        lines = row["transcript"]
        assert "".join(line["text"] for line in lines) == row["response"]
        assert [line["speaker"] for line in lines] == (["policy", "environment"] * 3)[: len(lines)]
        left, right = row["prompt"].rstrip("=").split("+")
        turns = [line for line in lines if line["speaker"] == "policy"]
        heard = [line["text"] for line in lines if line["speaker"] == "environment"]
        game = asyncio.run(replayed(int(left) + int(right), [turn["text"] for turn in turns]))
        assert [answer.observation for answer in game][: len(heard)] == heard
        assert [turn["reward"] for turn in turns] == pytest.approx([answer.reward for answer in game])
        assert row["score"] == pytest.approx(sum(answer.reward for answer in game))
    assert result.score.mean == pytest.approx(np.mean([row["score"] for row in answers]))
    assert len({row["response"] for row in answers}) > 8
    assert read_result(result.folder) == result


def test_a_prompt_that_could_not_be_played_counts_neither_as_right_nor_as_wrong(tmp_path):
    settings = f"environment={{name: '{MODULE}:Picky', max_turn_tokens: 2, retries: 0, max_failed_share: 0.2}}"
    result = evaluate_model(config(tmp_path, settings))
    assert (result.prompts, result.failed) == (7, 1)
    assert result.score.mean == 2.0  # `Echo` pays one for each of two turns.
    assert "1 more failed in their environment" in result.lines()[0]
    assert [row["prompt_id"] for row in read_samples(result.folder / ANSWERS)] == [0, 1, 2, 4, 5, 6, 7]
    assert read_result(result.folder) == result


def test_too_many_failures_stop_the_evaluation(tmp_path):
    settings = f"environment={{name: '{MODULE}:Picky', retries: 0, failed_floor: 0, max_turn_tokens: 2}}"
    with pytest.raises(AlarmError, match=r"1 of 8 samples failed.*not this one"):
        evaluate_model(config(tmp_path, settings))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "needs the section environment"),
        ([GAME, "keep.at_least=1"], "remove keep or environment"),
        (["environment.name=guesing"], "did you mean 'guessing'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        check_evaluation(config(tmp_path, *overrides))
