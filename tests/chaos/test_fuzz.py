"""Whatever a user writes into a configuration, a dataset or a reward function: it works, or it is their one clear mistake."""

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.cli import main
from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_datasets import prepare_prompts
from rayrlhf.errors import UserError
from rayrlhf.models.builtin import resolve_model
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.score import score_batch

MANY = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
SLOWER = settings(MANY, max_examples=250)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
VALID = {
    "model": {"path": "builtin:tiny"},
    "reward": {"functions": [{"name": "length"}]},
    "data": {"train": {"path": "prompts.jsonl"}},
}


def paths(section, prefix=()):
    """Every key of the configuration, sections included, with the start of some names cut off or doubled."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        if hasattr(field.annotation, "model_fields"):
            yield from paths(field.annotation, (*prefix, name))


KEYS = sorted(set(paths(PPOConfig)))
key = (
    st.sampled_from(KEYS) | st.tuples(st.text(max_size=5), st.text(max_size=5)) | st.sampled_from(KEYS).map(lambda k: (*k, "x"))
)


def put(tree, path, value):
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))


def one_clear_mistake(error, name=""):
    """At most five lines and the number of further ones, none of them empty or of Python's own making, about `name`."""
    assert name in str(error)
    lines = str(error).split("\n")
    assert 1 <= len(lines) <= 6
    assert all(line.strip() for line in lines)
    assert "Traceback" not in str(error)


def command_line(*arguments):
    """Exit code and standard error of the command `rayrlhf` in this process; what is not a user's mistake is raised."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["rayrlhf", *arguments])
        try:
            main()
        except SystemExit as ended:
            return ended.code, said.getvalue().strip()
    return 0, said.getvalue().strip()


def nothing_written(file):
    """Reading leaves the folder as the user left it: their files, and not one of ours."""
    return {path.name for path in file.parent.iterdir()} <= {"file", "file.jsonl"}


@SLOWER
@given(st.lists(st.tuples(key, anything), min_size=1, max_size=3))
def test_a_configurations_mistakes_are_named_and_end_the_command_with_exit_code_2(file, changes):
    tree = json.loads(json.dumps(VALID))
    for path, value in changes:
        put(tree, path, value)
    try:
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    except UnicodeEncodeError:
        return  # a lone surrogate cannot stand in a file
    code, said = command_line("ppo", str(file), "--dry-run")
    assert code == 2  # where nothing else is wrong, there is no prompts.jsonl
    one_clear_mistake(said)
    assert nothing_written(file)


@MANY
@given(st.lists(st.tuples(st.sampled_from(KEYS).map(".".join) | st.text(max_size=9), st.text(max_size=9)), max_size=3))
def test_an_override_is_applied_or_its_mistake_is_named(file, overrides):
    file.write_text(yaml.safe_dump(VALID), encoding="utf-8")
    try:
        load_config(PPOConfig, file, [f"{name}={value}" for name, value in overrides])
    except UserError as error:
        one_clear_mistake(error)
    assert nothing_written(file)


row = st.dictionaries(st.sampled_from(["prompt", "answer", ""]) | st.text(max_size=4), anything, max_size=3)
line = (
    row.map(lambda value: json.dumps(value).encode())
    | anything.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=20).filter(lambda content: b"\n" not in content)
    | st.just(b'{"prompt": [{"role": "user", "content": "hello"}]}')
)


@MANY
@given(st.lists(line, max_size=4), st.booleans())
def test_a_dataset_is_read_or_the_row_that_is_wrong_is_named(file, tokenizer, lines, chat):
    path = file.with_suffix(".jsonl")
    path.write_bytes(b"\n".join(lines))
    section = DatasetSection(path=str(path))
    try:
        prompts = prepare_prompts(section, DataSection(train=section, chat=chat), tokenizer, 64).prompts
    except UserError as error:
        one_clear_mistake(error, str(path))
    else:
        assert prompts
        assert all(len(prompt.token_ids) for prompt in prompts)
    assert nothing_written(file)


def bound(answer):
    def function(responses):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return BoundFunction("mine", function, 1.0, {})


arrays = st.lists(st.floats(width=32), max_size=4).map(lambda values: np.array(values, dtype=np.float32))
errors = st.sampled_from(
    [ValueError("no"), KeyError("answer"), ZeroDivisionError(), RuntimeError(""), AssertionError(), OSError(5, "x")]
)
results = anything | st.lists(st.floats() | st.none() | st.booleans() | st.integers(), min_size=2, max_size=2) | arrays | errors


@MANY
@given(results)
def test_a_reward_functions_result_is_two_finite_scores_or_a_mistake_that_names_the_function(result):
    batch = ScoringBatch(prompts=["a", "b"], responses=["c", "d"])
    try:
        scores = score_batch([bound(result)], batch).scores
    except UserError as error:
        one_clear_mistake(error, "mine")
    else:
        assert scores.shape == (2,)
        assert all(math.isfinite(score) for score in scores)
