"""The two built-in environments, and how an environment is found by its name."""

import asyncio

import numpy as np
import pytest

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Prompt
from rayrlhf.environments.calculator import Calculator, calculate
from rayrlhf.environments.guessing import Guessing
from rayrlhf.environments.protocol import Action, Answer
from rayrlhf.environments.registry import environment_maker
from rayrlhf.errors import UserError

TOKENS = np.zeros(1, np.int32)


def game(environment, prompt, *turns):
    async def play():
        assert await environment.reset(prompt, 0) == ""
        return [await environment.step(Action(text, TOKENS)) for text in turns]

    return asyncio.run(play())


@pytest.mark.parametrize(
    ("expression", "value"),
    [("37+58", "95"), (" 2 * (3 - 5) ", "-4"), ("7/2", "3.5"), ("-3", "-3"), ("6/3", "2"), ("1/3", "0.333333")],
)
def test_calculations_have_their_value(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1/0", "9**9**9", "a", "__import__('os')", "True+1", "1+", "1;2", "9" * 30, "1e999", "(" * 101, "1" + "+1" * 60, "2j"],
)
def test_anything_else_is_no_calculation(expression):
    with pytest.raises(ValueError, match=r"\w"):
        calculate(expression)


def test_the_calculator_answers_calls_and_judges_the_rest():
    prompt = Prompt(0, "37+58=", TOKENS, {"answer": 95})
    assert game(Calculator(call=0.1), prompt, "so [37+58]", "[37+]", " 95 ") == [
        Answer(" 95 ", 0.1),
        Answer(" error "),
        Answer("", 1.0, True),
    ]
    assert game(Calculator(), prompt, "94") == [Answer("", 0.0, True)]


def test_the_calculator_needs_the_answer():
    with pytest.raises(UserError, match="no column 'answer'; its columns are: number"):
        game(Calculator(), Prompt(0, "", TOKENS, {"number": 3}))


def test_the_game_points_to_the_number():
    prompt = Prompt(0, "", TOKENS, {"number": 6})
    heard = game(Guessing(column="number"), prompt, "3", "it is 8", "hm", "6")
    assert [answer.observation for answer in heard] == [">", "<", "?", ""]
    assert [answer.reward for answer in heard] == [-0.05, -0.05, -0.05, 1.0]
    assert [answer.done for answer in heard] == [False, False, False, True]


def test_every_sample_of_a_prompt_plays_for_the_same_number_and_prompts_differ():
    def hidden(prompt):
        answers = game(Guessing(), Prompt(prompt, "", TOKENS), *"0123456789")
        return next(number for number, answer in enumerate(answers) if answer.done)

    assert hidden(3) == hidden(3)
    assert len({hidden(prompt) for prompt in range(40)}) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "calculater"}, "is not registered; did you mean 'calculator'?"),
        ({"name": "tests.environments.sample_players:Ecko"}, "has no class or function 'Ecko'; did you mean 'Echo'?"),
        ({"name": "nowhere.at_all:Game"}, "'nowhere.at_all' cannot be imported"),
        ({"name": "nowhere.py:Game"}, "no such file"),
        ({"name": "rayrlhf.environments.protocol:Action"}, "Action needs a method 'async def reset'"),
        ({"name": "guessing", "arguments": {"hihg": 3}}, "takes no argument 'hihg'; did you mean 'high'?"),
    ],
)
def test_a_name_or_argument_that_fits_nothing_is_told_with_the_nearest(settings, message):
    with pytest.raises(UserError) as caught:
        environment_maker(EnvironmentSection.model_validate(settings))
    assert message in str(caught.value)


def test_a_class_in_a_file_is_found_and_made_again_for_each_sample(tmp_path):
    file = tmp_path / "game.py"
    file.write_text(
        "class Game:\n    def __init__(self, size=1): self.size = size\n"
        "    async def reset(self, prompt, seed): return ''\n    async def step(self, action): ...\n"
    )
    make = environment_maker(EnvironmentSection(name=f"{file}:Game", arguments={"size": 3}))
    assert make().size == 3
    assert make() is not make()
