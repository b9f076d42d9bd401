"""What a stage of Ray Data ends with reaches the driver as the error it was, in its own words."""

import pytest
import ray.data
from ray.exceptions import RayTaskError

from rayrlhf.actors.ray_data import data_context, raise_cause
from rayrlhf.errors import AlarmError, UserError

TRACEBACK = "Traceback of\nthe other process"


@pytest.mark.parametrize("cause", [UserError("a.jsonl: row 3: no"), AlarmError("too far")], ids=["mistake", "alarm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_error_of_ours_comes_out_of_all_that_ray_wraps_around_it(cause, layers):
    advised = type(cause)(f"{cause}\nFailed to apply after 1/1 attempts.")  # as Ray Data leaves it
    error = RayTaskError("stage", TRACEBACK, advised).as_instanceof_cause()
    assert isinstance(error, type(cause))
    if layers == 2:
        error = RayTaskError("another", TRACEBACK, error)
    assert "the other process" in str(error)
    with pytest.raises(type(cause)) as raised:
        raise_cause(error)
    assert type(raised.value) is type(cause)
    assert str(raised.value) == str(cause)


def test_a_bug_keeps_the_traceback_of_the_process_it_happened_in():
    error = RayTaskError("stage", TRACEBACK, ZeroDivisionError("x")).as_instanceof_cause()
    with pytest.raises(ZeroDivisionError, match="the other process"):
        raise_cause(error)


def test_settings_hold_inside_the_block_only_and_also_where_it_fails():
    context = ray.data.DataContext.get_current()
    before = context.execution_no_progress_timeout_s, context.execution_options.resource_limits.object_store_memory

    def fail():
        with data_context(buffer_bytes=1000, execution_no_progress_timeout_s=7.0):
            assert context.execution_no_progress_timeout_s == 7.0
            assert context.execution_options.resource_limits.object_store_memory == 1000
            assert context.raise_original_map_exception
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (context.execution_no_progress_timeout_s, context.execution_options.resource_limits.object_store_memory) == before
