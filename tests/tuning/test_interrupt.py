import os
import signal
import time

import pytest

from rayrlhf.errors import StoppedError
from rayrlhf.tuning.interrupt import stoppable


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_with_one_line_and_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedError, match="the same command goes on from the last checkpoint"):
        _kill_inside(number)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_is_left_by_an_exit_is_a_stop_too():
    with pytest.raises(StoppedError), stoppable():
        raise SystemExit(0)


def _kill_inside(number):
    with stoppable():
        os.kill(os.getpid(), number)
        time.sleep(5)
