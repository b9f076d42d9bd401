"""Rollout backends by name: built in, in a module, in a file."""

import pytest
from pydantic import ValidationError

from rayrlhf.config.rollout import BACKENDS, RolloutSection
from rayrlhf.engines.rollout.factory import ROLLOUT_ENGINES, check_rollout_backend
from rayrlhf.errors import UserError
from tests.engines.rollout_cases import make_requests, sample, start

GREEDY = """
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine

class Short(TransformersRolloutEngine):
    def __init__(self, spec, *, tokens):
        super().__init__(spec)
        self.tokens = tokens

    def submit(self, requests, *, temperature, max_new_tokens):
        super().submit(requests, temperature=temperature, max_new_tokens=self.tokens)
"""


def test_the_section_lists_the_built_in_engines():
    assert set(BACKENDS) == set(ROLLOUT_ENGINES.built_in)


def test_an_engine_in_a_file_is_started_with_its_arguments(tmp_path):
    file = tmp_path / "engine.py"
    file.write_text(GREEDY)
    engine = start(f"{file}:Short", arguments={"tokens": 3})
    rollouts = sample(engine, make_requests(1), max_new_tokens=24)
    engine.close()
    assert max(len(rollout.response_ids) for rollout in rollouts.values()) == 3


def test_an_unknown_backend_is_refused_when_the_config_is_read():
    with pytest.raises(ValidationError, match=r"'transfomers' is no rollout engine; did you mean 'transformers'\?"):
        RolloutSection(backend="transfomers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "nowhere.at_all:Engine"}, "rollout.backend 'nowhere.at_all:Engine': 'nowhere.at_all' cannot be imported"),
        ({"backend": "nowhere.py:Engine"}, "no such file"),
        ({"backend": "rayrlhf.engines.rollout.common:RolloutSpec"}, "RolloutSpec needs a method 'submit'"),
        ({"backend": "rayrlhf.engines.rollout.common:make_rollout"}, "is of type function, expected a class"),
        ({"backend": "transformers", "arguments": {"tokens": 3}}, "takes no argument 'tokens'; expected none"),
    ],
)
def test_a_wrong_backend_is_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        check_rollout_backend(RolloutSection(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
