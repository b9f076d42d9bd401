"""Who worked and who waited for whom."""

import pytest

from rayrlhf.tools.report.role_times import RoleSpan, last_steps, role_order, role_spans, role_times
from rayrlhf.tools.report.run_files import WorkSpan


def work(name: str, start: float, end: float, actor: str = "driver", step: int | None = 1) -> WorkSpan:
    return WorkSpan(name, actor, start, end, step)


def test_a_phase_of_the_driver_is_the_work_of_its_roles_and_actors_keep_their_names():
    spans = role_spans([work("weight_sync", 5, 6), work("generate", 0, 5), work("assemble", 6, 7), work("x", 1, 2, "other")])
    assert [(span.role, span.phase) for span in spans] == [
        ("rollout", "generate"),
        ("other", "x"),
        ("policy", "weight_sync"),
        ("rollout", "weight_sync"),
        ("driver", "assemble"),
    ]
    assert role_order(spans) == ["rollout", "policy", "driver", "other"]


def test_shares_of_work_and_waiting_are_of_the_time_in_which_anyone_worked():
    spans = role_spans([work("generate", 0, 6), work("update_policy", 10, 12)])
    rollout, policy = role_times(spans)
    assert (rollout.busy, rollout.waited) == (pytest.approx(0.75), {"policy": pytest.approx(0.25)})
    assert (policy.busy, policy.waited) == (pytest.approx(0.25), {"rollout": pytest.approx(0.75)})


def test_a_wait_is_divided_among_those_who_worked_at_once():
    spans = role_spans([work("update_policy", 0, 4), work("update_critic", 0, 2), work("generate", 4, 8)])
    rollout = role_times(spans)[0]
    assert rollout.role == "rollout"
    assert rollout.waited == {"critic": pytest.approx(1 / 8), "policy": pytest.approx(3 / 8)}


def test_overlapping_spans_of_a_role_count_once_and_shares_add_up_to_one():
    spans = role_spans([work("policy", 0, 4), work("update_policy", 2, 6), work("generate", 1, 8)])
    for time in role_times(spans):
        assert time.busy + sum(time.waited.values()) == pytest.approx(1)
    assert role_times(spans)[1].busy == pytest.approx(6 / 8)


def test_no_spans_and_spans_without_length_have_no_times():
    assert role_times([]) == []
    assert role_times([RoleSpan("policy", "x", 1.0, 1.0, 1)]) == []


def test_the_last_steps_are_those_with_the_highest_numbers():
    spans = role_spans([work("generate", step, step + 1, step=step) for step in range(1, 8)])
    assert sorted({span.step for span in last_steps(spans, 3)}) == [5, 6, 7]
    unnumbered = role_spans([work("generate", place, place + 1, step=None) for place in range(300)])
    assert [span.start for span in last_steps(unnumbered, 3)] == [float(place) for place in range(100, 300)]
