"""From the name in a config file to a reward function.

A name is one of three things: a registered name (`gsm8k`), `module:function` (`my_package.rewards:judge`), or
`path/to/file.py:function`. A file is imported under a private module name and its folder is not put on `sys.path`, so a user's
`random.py` cannot shadow anybody's import. Built-in functions are named here and imported when first asked for; a user's own
file registers more with `@register("name")`.
"""

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from rayrlhf.errors import UserError

RewardFunction = Callable[..., Any]
"""See `rayrlhf.rewards.functions` for what it is called with and what it returns."""

Function = TypeVar("Function", bound=RewardFunction)

BUILT_IN = {
    "code": "rayrlhf.rewards.programs:code",
    "environment": "rayrlhf.rewards.environment:environment",
    "format": "rayrlhf.rewards.format:matches_format",
    "gsm8k": "rayrlhf.rewards.gsm8k:gsm8k",
    "json_schema": "rayrlhf.rewards.json_schema:matches_json_schema",
    "judge": "rayrlhf.rewards.judge:judge",
    "length": "rayrlhf.rewards.length:length_penalty",
    "math_verify": "rayrlhf.rewards.math_verify:math_verify",
    "remote": "rayrlhf.rewards.remote:remote",
    "word_problems": "rayrlhf.rewards.toy_word_problems:word_problems",
    "word_problems_exact": "rayrlhf.rewards.toy_word_problems:word_problems_exact",
}
"""Registered name -> where the function is."""

_registered: dict[str, RewardFunction] = {}


def register(name: str) -> Callable[[Function], Function]:
    """Make a reward function known under a short name. Running the same definition again replaces it.

    Raises:
        UserError: the name is taken by another function, or is not a plain word.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"reward function name {name!r}: use letters, digits, '_' and '-' only")

    def decorate(function: Function) -> Function:
        taken = _registered.get(name)
        if name in BUILT_IN or (taken is not None and _definition(taken) != _definition(function)):
            owner = BUILT_IN.get(name) or ":".join(_definition(taken))
            raise UserError(f"reward function name {name!r} is taken by {owner}: register yours under another name")
        _registered[name] = function
        return function

    return decorate


def resolve(name: str) -> RewardFunction:
    """Return the function that a config's `reward.functions[].name` stands for.

    Args:
        name: a registered name, `module:function`, or `path/to/file.py:function` (relative to the working directory).

    Raises:
        UserError: nothing has that name (the nearest valid one is given), or its module cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    place, colon, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not colon:
        known = sorted({*BUILT_IN, *_registered})
        raise UserError(
            f"reward function {name!r} is not registered{_did_you_mean(name, known)}; "
            f"known are {', '.join(known)}, or give module:function or path/to/file.py:function"
        )
    module = import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        candidates = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "has no function" if function is None else "does not hold a function under"
        raise UserError(f"reward function {name!r}: {place} {what} {attribute!r}{_did_you_mean(attribute, candidates)}")
    return function  # type: ignore[no-any-return]


def import_files(files: Iterable[Path]) -> None:
    """Import the Python files of `reward.files`, so that they can register functions of their own.

    Raises:
        UserError: a file is missing or raises when imported.
    """
    for file in files:
        import_file(file)


class _FromSource(importlib.machinery.SourceFileLoader):
    """Compiles the file as it is now: Python's cache goes by size and whole seconds, and would lie beside the user's file."""

    def get_code(self, fullname: str) -> CodeType | None:
        return self.source_to_code(self.get_data(self.path), self.path)


def import_file(path: Path) -> ModuleType:
    """Import a Python file under a private name made of its path and content: once while unchanged, again after an edit.

    Raises:
        UserError: the file is missing or raises when imported.
    """
    if not path.is_file():
        raise UserError(f"reward file {path}: no such file (working directory {Path.cwd()})")
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    private_name = f"_rayrlhf_reward_file_{digest}"
    if private_name in sys.modules:
        return sys.modules[private_name]
    spec = importlib.util.spec_from_file_location(
        private_name, path.resolve(), loader=_FromSource(private_name, str(path.resolve()))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Listed while it runs, as any module is: dataclasses and pickle look their module up by name.
    sys.modules[private_name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[private_name]
        raise
    except Exception as error:
        del sys.modules[private_name]
        raise UserError(f"reward file {path} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward module {name!r} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error


def _definition(function: RewardFunction | None) -> tuple[str, str]:
    """Where a function was written; equal for two runs of the same definition."""
    code = getattr(function, "__code__", None)
    return getattr(code, "co_filename", repr(function)), getattr(function, "__qualname__", "")


def _did_you_mean(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
