"""Callbacks of the config: by name, with arguments."""

import pytest

from rayrlhf.config.runtime import CallbackSection
from rayrlhf.errors import UserError
from rayrlhf.ppo.callbacks import Callback, resolve_callbacks


class Limit(Callback):
    def __init__(self, reward=1.0):
        self.reward = reward


def test_callbacks_are_made_with_their_arguments_in_the_order_of_the_config():
    name = f"{__name__}:Limit"
    sections = [CallbackSection(name=name, arguments={"reward": 0.5}), CallbackSection(name=name)]
    assert [make().reward for make in resolve_callbacks(sections)] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "Limit",
            {},
            "callback 'Limit' is not registered; known are none, or give module:attribute or path/to/file.py:attribute",
        ),
        (f"{__name__}:Limits", {}, "has no subclass of rayrlhf.Callback 'Limits'; did you mean 'Limit'?"),
        (f"{__name__}:pytest", {}, "'pytest' is of type module, expected a subclass of rayrlhf.Callback"),
        (f"{__name__}:CallbackSection", {}, "'CallbackSection' is another class, expected a subclass"),
        (f"{__name__}:Limit", {"rewards": 1}, "takes no argument 'rewards'; did you mean 'reward'?"),
    ],
)
def test_a_wrong_callback_is_one_line(name, arguments, message):
    with pytest.raises(UserError) as caught:
        resolve_callbacks([CallbackSection(name=name, arguments=arguments)])
    assert message in str(caught.value)
