"""Over all steps each prompt of the stream is used once per pass; what breaks that is found at the step's end."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.stream_witness import StreamWitness

PROMPTS = [Prompt(number, "", np.array([number], np.int32)) for number in range(7)]


def begin():
    sampler = PromptSampler(PROMPTS, seed=3)
    return sampler, StreamWitness(sampler)


def take(sampler, watch, step, count=3):
    """One step: draw, consume, check."""
    ids = [prompt.id for prompt in sampler.next(count)]
    sampler.consumed(ids)
    watch.check(step, ids)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 9))
def test_any_order_of_steps_losses_and_resumes_passes(events, size):
    """0: a step. 1: prompts are drawn, and the run dies before it trains on them. 2: prompts are drawn ahead."""
    sampler, watch = begin()
    ahead = []
    for step, event in enumerate(events):
        ahead.append([prompt.id for prompt in sampler.next(size)])
        if event == 0:
            ids = ahead.pop(0)
            sampler.consumed(ids)
            watch.check(step, ids)
        if event == 1:
            saved = json.loads(json.dumps([sampler.state_dict(), watch.state()]))
            sampler, watch = begin()
            sampler.load_state_dict(saved[0])
            watch.load_state(saved[1])
            ahead = []


def test_a_prompt_that_the_cursor_skips_is_missed():
    sampler, watch = begin()
    take(sampler, watch, 1)
    sampler._draw()
    with pytest.raises(AlarmError, match="step 2: 6 prompts were used so far, and the stream had 7 for them"):
        take(sampler, watch, 2)


def test_a_prompt_that_comes_twice_in_a_pass_is_found():
    sampler, watch = begin()
    first = sampler.order(0)[0]
    real = sampler._draw
    sampler._draw = lambda: (real(), first)[1]
    with pytest.raises(AlarmError, match="step 1: 3 prompts were used so far, and the stream had 3 for them, other ones"):
        take(sampler, watch, 1)


def test_a_resume_that_forgets_what_was_outstanding_is_found():
    sampler, watch = begin()
    take(sampler, watch, 1)
    sampler.next(3)
    state, used = sampler.state_dict(), watch.state()
    again, resumed = begin()
    again.load_state_dict(state | {"outstanding": []})
    resumed.load_state(used)
    with pytest.raises(AlarmError, match="step 2: 6 prompts were used so far, and the stream had 9 for them"):
        take(again, resumed, 2)


def test_a_loop_of_ones_own_may_use_prompts_through_the_sampler():
    sampler = PromptSampler([Prompt(number, "q", np.array([1], np.int32)) for number in range(8)], seed=0)
    watch = StreamWitness(sampler)
    sampler.consumed([prompt.id for prompt in sampler.next(2)])
    ids = [prompt.id for prompt in sampler.next(4)]
    sampler.consumed(ids)
    watch.check(1, ids, strict=False)
    ids = [prompt.id for prompt in sampler.next(2)]
    sampler.consumed(ids)
    watch.check(2, ids)


def test_a_checkpoint_without_a_tally_is_taken_as_right():
    sampler, watch = begin()
    for step in range(5):
        take(sampler, watch, step)
    again, resumed = begin()
    again.load_state_dict(sampler.state_dict())
    resumed.load_state(None)
    take(again, resumed, 6)
    assert resumed.state()["prompts"] == 18
