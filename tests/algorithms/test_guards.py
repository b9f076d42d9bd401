import pytest

from rayrlhf.algorithms.importance import moved_too_far, ratio_exploded


@pytest.mark.parametrize(("policy_kl", "stops"), [(1.4, False), (1.5, False), (1.6, True), (-9.0, False)])
def test_epochs_stop_past_one_and_a_half_times_the_target(policy_kl: float, stops: bool) -> None:
    assert moved_too_far(policy_kl, target=1.0) is stops


def test_a_mini_batch_is_left_out_past_the_threshold_only() -> None:
    assert not ratio_exploded(10.0, threshold=10.0)
    assert ratio_exploded(10.1, threshold=10.0)
    assert ratio_exploded(float("inf"), threshold=10.0)
