"""The prompt stream: a permutation an epoch, indifferent to batch sizes, and nothing lost or doubled over a resume."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError


def prompts(count: int, first_token: int = 0) -> list[Prompt]:
    return [Prompt(10 * i, f"p{i}", np.array([first_token, i], dtype=np.int32)) for i in range(count)]


def ids(batch: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in batch]


@given(st.integers(1, 20), st.lists(st.integers(0, 15), max_size=12), st.integers(0, 5), st.booleans())
def test_the_order_does_not_depend_on_the_batch_sizes(count, sizes, seed, shuffle):
    cut = PromptSampler(prompts(count), seed=seed, shuffle=shuffle)
    whole = PromptSampler(prompts(count), seed=seed, shuffle=shuffle)
    pieces = [i for size in sizes for i in ids(cut.next(size))]
    assert pieces == ids(whole.next(sum(sizes)))


@given(st.integers(1, 30), st.integers(0, 1000))
def test_every_epoch_holds_every_prompt_once(count, seed):
    sampler = PromptSampler(prompts(count), seed=seed)
    for _ in range(3):
        assert sorted(ids(sampler.next(count))) == [10 * i for i in range(count)]


def test_epochs_and_seeds_differ_in_their_order():
    first, other = PromptSampler(prompts(50), seed=1), PromptSampler(prompts(50), seed=2)
    orders = [ids(first.next(50)), ids(first.next(50)), ids(other.next(50))]
    assert len({tuple(order) for order in orders}) == 3


def test_without_shuffling_the_order_is_that_of_the_dataset():
    sampler = PromptSampler(prompts(3), seed=1, shuffle=False)
    assert ids(sampler.next(7)) == [0, 10, 20, 0, 10, 20, 0]


def test_the_order_never_changes_from_release_to_release():
    assert ids(PromptSampler(prompts(8), seed=0).next(8)) == [30, 20, 10, 60, 0, 70, 40, 50]


@settings(max_examples=150)
@given(st.data(), st.integers(1, 12), st.integers(0, 3))
def test_a_resumed_stream_loses_nothing_and_doubles_nothing(data, count, seed):
    """Crash at random moments; what the surviving history consumed must be the plain stream, each place exactly once."""
    sampler = PromptSampler(prompts(count), seed=seed)
    saved, trained, trained_when_saved = sampler.state_dict(), Counter(), Counter()
    out: list[int] = []
    for _ in range(data.draw(st.integers(1, 15))):
        action = data.draw(st.sampled_from(["next", "consume", "save", "crash"]))
        if action == "next":
            out += ids(sampler.next(data.draw(st.integers(0, 5))))
        elif action == "consume" and out:
            done = data.draw(st.permutations(out))[: data.draw(st.integers(1, len(out)))]
            sampler.consumed(done)
            trained.update(done)
            out = list((Counter(out) - Counter(done)).elements())
        elif action == "save":
            saved, trained_when_saved = json.loads(json.dumps(sampler.state_dict())), trained.copy()
        elif action == "crash":
            sampler = PromptSampler(prompts(count), seed=seed)
            sampler.load_state_dict(saved)
            trained, out = trained_when_saved.copy(), []
    state = sampler.state_dict()
    stream = ids(PromptSampler(prompts(count), seed=seed).next(state["issued"]))
    assert Counter(stream) == trained + Counter(state["outstanding"])
    assert sampler.epoch == trained.total() / count


def test_outstanding_prompts_come_first_and_in_their_order_after_a_resume():
    sampler = PromptSampler(prompts(10), seed=3)
    handed_out = ids(sampler.next(4))
    sampler.consumed(handed_out[1:2])
    resumed = PromptSampler(prompts(10), seed=3)
    resumed.load_state_dict(sampler.state_dict())
    expected = [handed_out[0], handed_out[2], handed_out[3], *ids(sampler.next(3))]
    assert ids(resumed.next(2)) + ids(resumed.next(4)) == expected


def test_consuming_what_is_not_out_is_refused_and_marks_nothing():
    sampler = PromptSampler(prompts(4), seed=0, shuffle=False)
    sampler.next(2)
    with pytest.raises(ValueError, match=r"prompts \[30\] are not out"):
        sampler.consumed([0, 30])
    assert sampler.state_dict()["outstanding"] == [0, 10]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptSampler(prompts(5), seed=0), "prompts 4 -> 5"),
        (PromptSampler(prompts(4, first_token=1), seed=0), "their text or order"),
        (PromptSampler(prompts(4), seed=9), "seed 0 -> 9"),
        (PromptSampler(prompts(4), seed=0, shuffle=False), "shuffle True -> False"),
    ],
)
def test_another_dataset_or_seed_does_not_continue_a_run(other, message):
    with pytest.raises(UserError) as caught:
        other.load_state_dict(PromptSampler(prompts(4), seed=0).state_dict())
    assert message in str(caught.value)


def test_no_prompts_and_doubled_ids_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        PromptSampler([], seed=0)
    with pytest.raises(ValueError, match="same id"):
        PromptSampler([*prompts(2), *prompts(1)], seed=0)
