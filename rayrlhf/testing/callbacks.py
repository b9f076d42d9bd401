"""Contract test of callbacks."""

import inspect
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.plugins import bind_arguments, did_you_mean
from rayrlhf.ppo.callbacks import CALLBACKS, Callback
from rayrlhf.testing.expect import expect

HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_callback(callback: type[Callback] | str, **arguments: Any) -> Callback:
    """Check that a class is a callback whose hooks exist and take the loop's arguments.

    The hooks are not called.

    Args:
        callback: the class or its name in a config.
        arguments: `arguments` of the config.

    Returns:
        An instance.

    Raises:
        AssertionError: the class breaks its contract.
    """
    try:
        kind = CALLBACKS.resolve(callback) if isinstance(callback, str) else callback
        expect(inspect.isclass(kind) and issubclass(kind, Callback), f"{kind!r} is no subclass of rayrlhf.Callback")
        made = bind_arguments(f"callback {kind.__name__!r}", kind, arguments)()
    except UserError as error:
        raise AssertionError(str(error)) from error
    for name in dir(kind):
        if name.startswith("on_") and callable(getattr(kind, name)):
            expect(name in HOOKS, f"{kind.__name__}.{name} is no hook{did_you_mean(name, HOOKS)}; hooks are {', '.join(HOOKS)}")
            _check_signature(kind, name)
    return made


def _check_signature(kind: type[Callback], name: str) -> None:
    hook = getattr(kind, name)
    expect(not inspect.iscoroutinefunction(hook), f"{kind.__name__}.{name} is a coroutine function, expected a plain method")
    expected = list(inspect.signature(getattr(Callback, name)).parameters)
    try:
        inspect.signature(hook).bind(*expected)
    except TypeError as error:
        raise AssertionError(f"{kind.__name__}.{name}: {error}; it is called with ({', '.join(expected[1:])})") from error
