"""Plugin names: registered, in a module, in a file; and the messages of wrong names."""

import pickle
import sys
from pathlib import Path

import pytest

from rayrlhf.errors import UserError
from rayrlhf.plugins import Registry, bind_arguments
from rayrlhf.rewards.registry import REWARD_FUNCTIONS, import_files, register, resolve


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(REWARD_FUNCTIONS, "_registered", {})


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "random.py"  # a name that must not shadow the standard library's
    path.write_text(
        "from dataclasses import dataclass\n"
        "from rayrlhf.rewards.registry import register\n"
        "@dataclass\nclass Box:\n    value: float\n"
        "@register('mine')\ndef polite(responses):\n    return [Box('please' in r).value for r in responses]\n"
        "constant = 3\n"
    )
    return path


@pytest.mark.parametrize("name", sorted(REWARD_FUNCTIONS.built_in))
def test_every_built_in_name_resolves(name: str):
    assert callable(resolve(name))


def test_a_function_in_a_module_resolves():
    assert resolve("rayrlhf.rewards.gsm8k:gsm8k") is resolve("gsm8k")


def test_a_function_in_a_file_resolves_without_touching_the_import_path(user_file: Path):
    path_before, random_before = list(sys.path), sys.modules["random"]
    function = resolve(f"{user_file}:polite")
    assert function(["please", "now"]) == [True, False]
    assert sys.path == path_before
    assert sys.modules["random"] is random_before
    assert resolve(f"{user_file}:polite") is function
    assert pickle.loads(pickle.dumps(function)) is function


def test_an_edited_file_is_read_again(user_file: Path):
    assert resolve(f"{user_file}:polite")(["please"]) == [True]
    user_file.write_text(user_file.read_text().replace("please", "thanks"))
    assert resolve(f"{user_file}:polite")(["please"]) == [False]


def test_a_file_registers_names_of_its_own(user_file: Path):
    import_files([user_file, user_file])
    assert resolve("mine")(["please"]) == [True]


def test_a_name_cannot_be_taken_twice():
    register("twice")(lambda responses: [])
    with pytest.raises(UserError, match="'twice' is taken by"):
        register("twice")(test_a_name_cannot_be_taken_twice)
    with pytest.raises(UserError, match=r"'gsm8k' is taken by rayrlhf\.rewards\.gsm8k:gsm8k"):
        register("gsm8k")(lambda responses: [])
    with pytest.raises(UserError, match="letters, digits"):
        register("a:b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gms8k", "reward function 'gms8k' is not registered; did you mean 'gsm8k'?"),
        (
            "nothing_like_it",
            "known are code, environment, format, gsm8k, json_schema, judge, length, math_verify, remote, word_problems",
        ),
        ("rayrlhf.rewards.gsm8k:gsm9k", "has no function 'gsm9k'; did you mean 'gsm8k'?"),
        ("no_such_module_here:f", "'no_such_module_here' cannot be imported: ModuleNotFoundError"),
        (":f", "cannot be imported"),
        ("missing.py:f", "missing.py: no such file"),
        ("{file}:pollite", "has no function 'pollite'; did you mean 'polite'?"),
        ("{file}:constant", "'constant' is of type int, expected a function"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_would_be_right(user_file: Path, name: str, message: str):
    with pytest.raises(UserError) as caught:
        resolve(name.format(file=user_file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["def f(:", "raise ValueError('two\\nlines')", "import no_such_module_here"])
def test_a_file_that_cannot_be_imported_is_one_line_and_leaves_no_module(tmp_path: Path, source: str):
    path = tmp_path / "broken.py"
    path.write_text(source)
    modules = set(sys.modules)
    with pytest.raises(UserError, match=r"broken\.py cannot be imported: \w+Error") as caught:
        resolve(f"{path}:f")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert {name for name in set(sys.modules) - modules if name.startswith("_rayrlhf")} == set()


def test_a_built_in_plugin_may_be_given_as_an_object():
    registry: Registry[type] = Registry("shape", {"square": dict, "line": "builtins:list"}, "class")
    assert registry.resolve("square") is dict
    assert registry.resolve("line") is list
    registry.register("dot")(set)
    assert registry.names == ["dot", "line", "square"]
    with pytest.raises(UserError, match=r"shape 'dots' is not registered; did you mean 'dot'\?.* give module:attribute"):
        registry.resolve("dots")


def loss(inputs, *, clip_range=0.2, floor):
    return inputs, clip_range, floor


def test_arguments_are_bound_by_name():
    assert bind_arguments("loss 'x'", loss, {"floor": 1}, positional=1)(7) == (7, 0.2, 1)
    assert bind_arguments("loss 'x'", lambda **rest: rest, {"any": 1})() == {"any": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flor": 1}, "loss 'x' takes no argument 'flor'; did you mean 'floor'?"),
        ({"zzz": 1}, "loss 'x' takes no argument 'zzz'; expected clip_range, floor"),
        ({"inputs": 1}, "loss 'x' takes no argument 'inputs'"),
        ({}, "loss 'x': arguments do not fit: missing a required argument: 'floor'"),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_nearest_valid_one(arguments, message):
    with pytest.raises(UserError) as caught:
        bind_arguments("loss 'x'", loss, arguments, positional=1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
