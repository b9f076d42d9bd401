"""Waits on real actors: deadlines and deaths are named, users' mistakes keep their one line, bugs keep their traceback."""

import os
import time

import pytest
import ray
import torch

from rayrlhf.actors.actor_group import ActorGroup
from rayrlhf.actors.remote import remote_call
from rayrlhf.actors.waiting import as_completed, wait_all
from rayrlhf.errors import ActorLostError, DeadlineError, DeviceMemoryError, UserError


class Subject:
    def answer(self, value, seconds=0.0):
        time.sleep(seconds)
        return value

    def mistake(self):
        raise UserError("data.train: row 3 has no prompt")

    def bug(self):
        return {}["missing"]

    def fill(self):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.10 GiB is "
            "free. This process has 60.00 GiB memory in use. If reserved but unallocated memory is large"
        )

    def die(self):
        os._exit(1)


def call_each(group, *arguments):
    """A call of `answer` on each rank with its own arguments, by name."""
    return {
        name: group.call_rank(rank, Subject.answer, *own)
        for rank, (name, own) in enumerate(zip(group.names, arguments, strict=True))
    }


@pytest.fixture(scope="module")
def group():
    ray.init(num_cpus=2, include_dashboard=False, namespace="waiting", log_to_driver=False, logging_level="error")
    handles = tuple(ray.remote(Subject).options(num_cpus=0.1).remote() for _ in range(2))
    yield ActorGroup("reward", ("run/reward/0", "run/reward/1"), handles)
    ray.shutdown()


def test_answers_come_back_in_the_order_of_the_ranks_whichever_was_first(group):
    calls = call_each(group, ("slow", 0.5), ("fast", 0.0))
    assert wait_all(calls, "answer", 30) == ["slow", "fast"]


def test_answers_are_handed_on_as_they_come(group):
    calls = call_each(group, ("slow", 0.5), ("fast", 0.0))
    assert [name for name, _ in as_completed(calls, "answer", 30)] == ["run/reward/1", "run/reward/0"]


def test_a_wait_that_overruns_says_for_what_on_whom_and_since_when(group):
    calls = call_each(group, ("fast", 0.0), ("slow", 3.0))
    with pytest.raises(DeadlineError, match=r"score: no response from run/reward/1 within 1 s \(called at \d\d:\d\d:\d\d\)"):
        wait_all(calls, "score", 1.0)
    wait_all(calls, "score", 30)


def test_a_users_mistake_inside_an_actor_arrives_as_the_line_it_is(group):
    with pytest.raises(UserError, match=r"^data\.train: row 3 has no prompt$"):
        wait_all(group.call(Subject.mistake), "mistake", 30)


def test_a_bug_inside_an_actor_keeps_its_own_type_and_traceback(group):
    with pytest.raises(KeyError, match="missing") as caught:
        wait_all(group.call(Subject.bug), "bug", 30)
    assert "in bug" in str(caught.value)


def test_a_call_whose_input_died_with_its_maker_counts_as_a_loss_and_not_as_a_bug(group):
    maker = ray.remote(Subject).options(num_cpus=0.1).remote()
    call = group.call_rank(0, Subject.answer, remote_call(maker, Subject.die))
    with pytest.raises(ActorLostError, match="run/reward/0 was lost during answer: its input is gone") as caught:
        wait_all({"run/reward/0": call}, "answer", 30)
    assert caught.value.actor == "run/reward/0"
    assert wait_all({"run/reward/0": group.call_rank(0, Subject.answer, "still there")}, "answer", 30) == ["still there"]


def test_lack_of_gpu_memory_is_one_line_with_role_and_first_change_to_try(group):
    with pytest.raises(DeviceMemoryError) as caught:
        wait_all({"run/policy/0": group.call_rank(0, Subject.fill)}, "update", 30)
    text = str(caught.value)
    assert text.startswith("run/policy/0: update: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "This process has 60.00 GiB memory in use; lower train.micro_batch_tokens, or set" in text
    assert "\n" not in text
    assert "If reserved" not in text


def test_a_dead_actor_is_named_at_once_although_the_others_still_work(group):
    started = time.monotonic()
    calls = {group.names[0]: group.call_rank(0, Subject.answer, "late", 8.0), group.names[1]: group.call_rank(1, Subject.die)}
    with pytest.raises(ActorLostError, match="run/reward/1 was lost during score"):
        wait_all(calls, "score", 60)
    assert time.monotonic() - started < 8.0
