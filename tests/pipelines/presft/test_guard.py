"""The guard refuses what must never replace a person's response, and nothing else."""

import pytest

from rayrlhf.pipelines.presft.selection import is_looping, refusal

SETTINGS = {"loop_repeats": 4, "verifier_score": None, "verifier_minimum": 0.5}


@pytest.mark.parametrize(
    ("response", "finish", "changes", "expected"),
    [
        ("3 + 4 = 7", "stop", {}, None),
        ("", "stop", {}, "empty"),
        (" \n\t", "length", {}, "empty"),
        ("3 + 4 =", "length", {}, "cut off"),
        ("and so on " * 8, "length", {}, "looping"),
        ("right", "stop", {"verifier_score": 0.5}, None),
        ("wrong", "stop", {"verifier_score": 0.4}, "fails the verifier"),
        ("unknown", "stop", {"verifier_score": float("nan")}, "fails the verifier"),
        ("cut", "length", {"verifier_score": 0.0}, "cut off"),
    ],
)
def test_a_response_is_refused_for_its_first_fault(response, finish, changes, expected):
    assert refusal(response, finish, **(SETTINGS | changes)) == expected


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("x" * 32, True),
        ("x" * 31, False),
        ("Fine start. " + "I am a bot. " * 4, True),
        ("Fine start. " + "I am a bot. " * 4 + "I am a", True),
        ("I am a bot. " * 3, False),
        ("I am a bot. " * 4 + "And then it ended well.", False),
        ("ha ha ha ha", False),
        ("7 + 7 + 7 + 7 = 28", False),
        ("漢字漢字" * 10, True),
        ("", False),
        ("one two three four five six seven eight nine ten eleven twelve", False),
    ],
)
def test_a_loop_is_a_long_repeat_at_the_end(text, looping):
    assert is_looping(text, 4) == looping


def test_the_number_of_repeats_is_the_callers():
    text = "a whole sentence, repeated. " * 3
    assert is_looping(text, 3)
    assert not is_looping(text, 4)
