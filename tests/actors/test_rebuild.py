"""A lost process is rebuilt until an attempt succeeds, a bounded number of times in a row, with growing delays."""

import pytest

from rayrlhf.actors import rebuild
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.rebuild import Rebuilder
from rayrlhf.errors import ActorLostError, DeviceMemoryError


@pytest.fixture
def delays(monkeypatch):
    slept = []
    monkeypatch.setattr(rebuild.time, "sleep", slept.append)
    return slept


def failing(times):
    """An attempt that fails some times, and the losses that it was given."""
    seen = []

    def attempt(error):
        seen.append(str(error))
        if len(seen) <= times:
            raise ActorLostError(f"failure {len(seen)}", "run/policy/1")

    return attempt, seen


def test_every_attempt_is_given_the_latest_loss_and_waits_longer_than_the_one_before(delays):
    attempt, seen = failing(2)
    Rebuilder(RetryPolicy(attempts=3, backoff=8.0)).rebuild_with_backoff(ActorLostError("gone", "run/policy/0"), attempt)
    assert seen == ["gone", "failure 1", "failure 2"]
    assert delays == pytest.approx([0.0, 8.0, 16.0], abs=0.5)


def test_too_many_losses_in_a_row_name_the_first_actor_and_the_last_reason(delays):
    attempt, seen = failing(5)
    with pytest.raises(ActorLostError, match="failure 3; given up after 3 rebuilds in a row") as caught:
        Rebuilder(RetryPolicy(attempts=3)).rebuild_with_backoff(ActorLostError("gone", "run/policy/0"), attempt)
    assert caught.value.actor == "run/policy/0"
    assert len(seen) == 3


def test_only_a_completed_step_resets_the_count(delays):
    rebuilder, lost = Rebuilder(RetryPolicy(attempts=1)), ActorLostError("gone", "run/reward/0")
    rebuilder.rebuild_with_backoff(lost, lambda _: None)
    rebuilder.step_completed()
    rebuilder.rebuild_with_backoff(lost, lambda _: None)
    with pytest.raises(ActorLostError, match="given up after 1 rebuilds in a row"):
        rebuilder.rebuild_with_backoff(lost, lambda _: None)


def test_a_lack_of_device_memory_is_a_loss(delays):
    def full(error):
        seen.append(str(error))
        raise DeviceMemoryError("reward.judge: vLLM cannot serve m: Free memory on device cuda:0 (3.1/79.1 GiB)")

    seen = []
    with pytest.raises(ActorLostError, match=r"Free memory on device .*; given up after 2 rebuilds in a row") as caught:
        Rebuilder(RetryPolicy(attempts=2)).rebuild_with_backoff(ActorLostError("gone", "run/judge/0"), full)
    assert caught.value.actor == "run/judge/0"
    assert len(seen) == 2


def test_another_error_of_an_attempt_is_not_retried(delays):
    def attempt(_):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        Rebuilder(RetryPolicy()).rebuild_with_backoff(ActorLostError("gone"), attempt)
    assert len(delays) == 1
