"""Stop signals: the first is recorded, the second ends the process; under Ray Train the first is an error."""

import os
import signal
import time

import pytest

from rayrlhf.errors import StoppedError
from rayrlhf.observe.loop_control import is_due, stop_as_error, stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop_and_says_which_it_was(number):
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name


def test_a_second_signal_does_what_it_would_have_done():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop


def test_the_handlers_of_before_are_back_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_outside_of_the_main_thread_is_left_alone():
    import threading

    seen = []

    def work():
        with stop_requests() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_with_one_line_and_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedError, match="the same command goes on from the last checkpoint"):
        _kill_inside(number)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_is_left_by_an_exit_is_a_stop_too():
    with pytest.raises(StoppedError), stop_as_error():
        raise SystemExit(0)


def _kill_inside(number):
    with stop_as_error():
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_an_action_is_due_at_every_nth_step_and_never_at_zero():
    assert [step for step in range(7) if is_due(step, 3)] == [0, 3, 6]
    assert not any(is_due(step, 0) for step in range(7))
