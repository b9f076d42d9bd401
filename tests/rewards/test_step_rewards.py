"""Steps of a response: where they end, what their score is, and which tokens are paid."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.rewards.step_rewards import ScoredSteps, paid_at_tokens, split_steps, step_payments, step_score

PROBABILITIES = arrays.arrays(np.float32, st.integers(1, 8), elements=st.floats(0, 1, width=32))
AGGREGATES = {"min": min, "product": np.prod, "last": lambda p: p[-1], "sum": sum}


@given(PROBABILITIES, st.sampled_from(sorted(AGGREGATES)))
def test_payments_add_up_to_the_score(probabilities, aggregate):
    score = step_score(probabilities, aggregate)
    assert score == pytest.approx(float(AGGREGATES[aggregate](probabilities.astype(float))), abs=1e-5)
    assert float(step_payments(probabilities, aggregate).sum()) == pytest.approx(score, abs=1e-5)


def test_a_step_is_paid_the_change_of_the_score():
    probabilities = np.array([0.5, 0.75, 0.25], np.float32)
    expected = {"min": [0.5, 0, -0.25], "product": [0.5, -0.125, -0.28125], "last": [0.5, 0.25, -0.5], "sum": [0.5, 0.75, 0.25]}
    for aggregate, payments in expected.items():
        np.testing.assert_allclose(step_payments(probabilities, aggregate), payments, atol=1e-7)


@pytest.mark.parametrize(
    ("response", "steps", "ends"),
    [
        ("a\nbc\nd", ["a", "bc", "d"], [2, 5, 6]),
        ("a\nbc\n", ["a", "bc"], [2, 5]),
        ("\n\na\n \n\nb\n\n", ["a", "b"], [7, 10]),
        ("a", ["a"], [1]),
        ("", [""], [0]),
        (" \n", [" \n"], [2]),
    ],
)
def test_a_response_is_split_at_the_separator(response, steps, ends):
    assert split_steps(response, "\n") == (steps, ends)


@given(st.text(alphabet="ab\n ", max_size=30))
def test_every_step_ends_where_its_text_does(response):
    steps, ends = split_steps(response, "\n")
    begin = 0
    for step, end in zip(steps, ends, strict=True):
        assert step.strip() == response[begin:end].strip()
        begin = end
    assert begin == len(response)


@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_a_step_is_paid_at_its_last_token_and_the_last_one_at_the_end(end):
    tokenizer, text = byte_tokenizer(), "a\nü\nc"
    ids = tokenizer(text + end, add_special_tokens=False)["input_ids"]
    rollout = SimpleNamespace(response_ids=np.array(ids), text=text)
    steps = ScoredSteps(np.array([0.5, 0.75, 0.25], np.float32), split_steps(text, "\n")[1])
    paid = paid_at_tokens(steps, "sum", rollout, tokenizer)
    first, second = (np.flatnonzero(np.array(ids) == tokenizer.encode("\n", add_special_tokens=False)[0])).tolist()
    assert {token: float(paid[token]) for token in np.flatnonzero(paid)} == {first: 0.5, second: 0.75, len(ids) - 1: 0.25}
