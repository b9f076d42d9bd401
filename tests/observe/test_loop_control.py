"""Stop signals: the first is recorded, the second ends the process; under Ray Train the first is an error."""

import os
import signal
import time

import pytest

from rayrlhf.errors import StoppedError
from rayrlhf.observe import loop_control
from rayrlhf.observe.loop_control import SIGNALS, is_due, stop_as_error, stop_requests


def never():
    return False


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_the_run_to_stop_and_says_which_it_was(number):
    with stop_requests() as stop:
        stop.may_abandon = never
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name


def test_a_later_second_signal_does_what_it_would_have_done(monkeypatch):
    monkeypatch.setattr(loop_control, "REPEAT_SECONDS", 0.0)
    with stop_requests() as stop:
        stop.may_abandon = never
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop


def test_the_same_stop_sent_to_the_process_and_to_its_group_is_one():
    with stop_requests() as stop:
        stop.may_abandon = never
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signal_name == "SIGTERM"


def test_a_run_that_loads_its_models_stops_at_once():
    with pytest.raises(StoppedError, match="stopped on SIGTERM; the same command resumes"):
        _stop_inside(300.0, None)


@pytest.mark.parametrize(("grace", "seconds", "idle"), [(0.1, 60.0, True), (60.0, 0.1, False)])
def test_a_step_is_abandoned_early_while_it_samples_and_late_while_it_updates(monkeypatch, grace, seconds, idle):
    monkeypatch.setattr(loop_control, "STEP_GRACE_SECONDS", grace)
    began = time.monotonic()
    with pytest.raises(StoppedError):
        _stop_inside(seconds, lambda: idle)
    assert time.monotonic() - began < 20


def test_a_run_that_acts_on_the_stop_is_not_interrupted(monkeypatch):
    monkeypatch.setattr(loop_control, "STEP_GRACE_SECONDS", 0.1)
    with stop_requests(0.2) as stop:
        stop.may_abandon = lambda: True
        os.kill(os.getpid(), signal.SIGTERM)
        stop.settle()
        time.sleep(1.0)


def test_nohup_keeps_the_run_alive():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_block_with_one_line_and_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(StoppedError, match=f"stopped on {number.name}; the same command resumes"):
        _kill_inside(number)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def _stop_inside(seconds, may_abandon):
    with stop_requests(seconds) as stop:
        stop.may_abandon = may_abandon
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def _kill_inside(number):
    with stop_as_error():
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_an_action_is_due_at_every_nth_step_and_never_at_zero():
    assert [step for step in range(7) if is_due(step, 3)] == [0, 3, 6]
    assert not any(is_due(step, 0) for step in range(7))
