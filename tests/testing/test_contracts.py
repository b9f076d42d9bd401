"""The contract tests accept the built-in plugins and name the fault of broken ones."""

import re
import time

import numpy as np
import pytest

from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Answer
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.testing import check_callback, check_environment, check_reward_function, check_rollout_engine

ROW = Prompt(0, "37+58=", np.arange(1, 4, dtype=np.int32), {"answer": 95})


def fails(message):
    return pytest.raises(AssertionError, match=f"^{message}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("format", {"pattern": "x"}),
        ("json_schema", {"json_schema": {}}),
        ("length", {"soft_limit": 2, "hard_limit": 20}),
        ("environment", {}),
        ("gsm8k", {"columns": {"answer": [1, 7, 1234, 5]}}),
        ("word_problems", {"columns": {"answer": [1, 7, 1234, 5]}}),
        ("word_problems_exact", {"columns": {"answer": [1, 7, 1234, 5]}}),
    ],
)
def test_built_in_reward_functions_keep_the_contract(name, options):
    assert len(check_reward_function(name, **options)) == 4


def test_a_reward_per_token_keeps_the_contract():
    check_reward_function(lambda rollouts: [np.ones(len(r.response_ids)) for r in rollouts], per="token")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda responses: [1.0], "reward function 'checked' returned 1 values, expected 4"),
        (lambda responses: [float("nan")] * len(responses), "reward function 'checked' returned float nan for sample 0"),
        (lambda responses: [None] * len(responses), "the reward function applies to no response"),
        (lambda responses: [float(len(responses))] * len(responses), "response 0 has value 4 within the batch and 1 alone"),
        (lambda anwser: anwser, "reward function 'checked' needs column 'anwser'"),
        (lambda responses: 1 / 0, "reward function 'checked' raised ZeroDivisionError"),
    ],
)
def test_a_broken_reward_function_is_named(function, message):
    with fails(message):
        check_reward_function(function)


def test_a_reward_function_that_compares_samples_is_accepted_when_declared():
    check_reward_function(lambda responses: [float(len(responses))] * len(responses), independent=False)


def test_built_in_environments_keep_the_contract():
    assert [answer.observation for answer in check_environment("calculator", ["[37+58]", "95"], ROW)] == [" 95 ", ""]
    assert not check_environment("guessing", ["no number"], high=99)[0].done


class Game:
    opening, answer = "", Answer("go on")

    async def reset(self, prompt, seed):
        return self.opening

    async def step(self, action):
        return self.answer


class Blocking(Game):
    async def step(self, action):
        time.sleep(1.2)
        return self.answer


class Counting(Game):
    played = 0

    async def step(self, action):
        type(self).played += 1
        return Answer(str(self.played))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (type("Silent", (Game,), {"opening": None}), "reset returned NoneType, expected text"),
        (type("Tuple", (Game,), {"answer": ("", 1.0, True)}), "step returned tuple, expected an Answer"),
        (type("Nan", (Game,), {"answer": Answer("", float("nan"))}), "reward nan, expected a finite number"),
        (type("Done", (Game,), {"answer": Answer("", 1.0, 1)}), "done 1, expected a bool"),
        (Blocking, r"step blocked the event loop for 1\.\d s"),
        (Counting, "the same turns and seed gave"),
        ("guesing", "environment.name 'guesing' is not registered; did you mean 'guessing'"),
    ],
)
def test_a_broken_environment_is_named(environment, message):
    with fails(message):
        check_environment(environment, ["one", "two"])


def test_an_unknown_argument_of_an_environment_is_named():
    with fails("environment.name 'guessing' takes no argument 'hihg'; did you mean 'high'?"):
        check_environment("guessing", hihg=3)


class Stop(Callback):
    def __init__(self, reward=1.0):
        self.reward = reward

    def on_step_end(self, step, metrics, scored): ...


def test_a_callback_is_made_with_its_arguments():
    assert check_callback(f"{__name__}:Stop", reward=0.5).reward == 0.5
    check_callback(Callback)


async def coroutine(self, trainer): ...


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"on_step_ended": lambda self: None}, "Mine.on_step_ended is no hook; did you mean 'on_step_end'"),
        ({"on_step_end": lambda self, step: None}, r"Mine.on_step_end: .*; it is called with \(step, metrics, scored\)"),
        ({"on_start": coroutine}, "Mine.on_start is a coroutine function"),
    ],
)
def test_a_broken_callback_is_named(members, message):
    with fails(message):
        check_callback(type("Mine", (Callback,), members))
    with fails("callback 'Stop' is not registered"):
        check_callback("Stop")


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_built_in_rollout_engines_keep_the_contract(backend):
    check_rollout_engine(backend)


ENGINES = """
import numpy as np
from dataclasses import replace
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine as Base

class Changed(Base):
    def poll(self, minimum, seconds=None):
        return [self.change(rollout) for rollout in super().poll(minimum, seconds)]

class Lost(Base):
    def poll(self, minimum, seconds=None):
        return super().poll(minimum, seconds)[1:]

class Warm(Changed):
    def change(self, rollout):
        return replace(rollout, logprobs=rollout.logprobs * np.float32(0.9))

class Double(Changed):
    def change(self, rollout):
        return replace(rollout, logprobs=rollout.logprobs.astype(np.float64))

class Unversioned(Changed):
    def change(self, rollout):
        return replace(rollout, versions=rollout.versions * 0 + 9)

class Deaf(Base):
    def receive_weights(self, bucket):
        self._missing.clear()

class Keeping(Base):
    def cancel(self):
        pass

class Silent(Base):
    def cancel(self):
        super().cancel()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Lost", "requests .* finished, expected each request once"),
        ("Warm", r"log-probs differ from a forward pass by \S+ nats, expected < 0.001"),
        ("Double", "rollout .*: logprobs is float64"),
        ("Unversioned", "rollout .*: versions .*, expected -1"),
        ("Deaf", "log-probs differ from a forward pass"),
        ("Keeping", "6 unfinished after cancel"),
        ("Silent", "cancel returned None, expected the number of sampled tokens"),
        ("Absent", "rollout.backend .* has no class 'Absent'"),
    ],
)
def test_a_broken_rollout_engine_is_named(tmp_path, name, message):
    file = tmp_path / "engines.py"
    file.write_text(ENGINES)
    with pytest.raises(AssertionError) as caught:
        check_rollout_engine(f"{file}:{name}")
    assert re.match(message, str(caught.value).replace(str(tmp_path), ""))
