"""Reward functions called once before a run: what is wrong with one is named at the start."""

import time

import numpy as np
import pytest

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.rewards.functions import load_functions
from rayrlhf.rewards.probe import probe_functions
from tests.ppo.runs import run_config


def raises(responses):
    raise ValueError("no such unit")


def too_few(responses):
    return [1.0]


def texts(responses):
    return ["1" for _ in responses]


def not_a_number(responses):
    return [float("nan") for _ in responses]


def by_answer(responses, answer):
    return [float(len(text)) for text in answer]


def slow(responses):
    time.sleep(1.1)
    return [0.0, None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(run_config(tmp_path_factory.mktemp("model")).model)


def prompts(*answers):
    ids = np.arange(1, 4, dtype=np.int32)
    return [Prompt(index, "2 + 2", ids, {} if answer is ... else {"answer": answer}) for index, answer in enumerate(answers)]


def probe(name, rows, tokenizer):
    section = RewardSection(functions=[RewardFunctionSection(name=name)])
    return probe_functions(load_functions(section), rows, tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "'raises' raised ValueError: no such unit .*; it was called on two made-up responses"),
        ("too_few", "'too_few' returned 1 values, expected 2"),
        ("texts", "'texts' returned str '1' for sample 0"),
        ("not_a_number", "'not_a_number' returned float nan for sample 0"),
        ("by_answer", "'by_answer' needs column 'answer'; the dataset's columns are: none"),
    ],
)
def test_a_faulty_function_is_named_at_the_start(tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        probe(f"tests.rewards.test_probe:{name}", prompts(..., ...), tokenizer)


def test_the_row_without_a_column_is_among_those_tried(tokenizer):
    assert probe("tests.rewards.test_probe:by_answer", prompts("a", "b", "c"), tokenizer) == []
    with pytest.raises(UserError, match="'by_answer' raised TypeError"):
        probe("tests.rewards.test_probe:by_answer", prompts("a", "b", None), tokenizer)


def test_a_slow_function_is_said_and_not_refused(tokenizer):
    (line,) = probe("tests.rewards.test_probe:slow", prompts(..., ...), tokenizer)
    assert line.startswith("reward function 'slow' took 1.")


@pytest.mark.parametrize("name", ["judge", "remote", "environment"])
def test_functions_that_need_a_server_or_an_episode_are_not_called(tokenizer, name):
    arguments = {} if name == "environment" else {"urls": ["http://127.0.0.1:1"]} | ({"model": "m"} if name == "judge" else {})
    section = RewardSection(functions=[RewardFunctionSection(name=name, arguments=arguments)])
    assert probe_functions(load_functions(section), prompts(...), tokenizer) == []
