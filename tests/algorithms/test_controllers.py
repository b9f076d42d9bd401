import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.kl import AdaptiveKLController, FixedKLController, kl_controller


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.001), (5.4, 0.999), (7.2, 1.002), (60.0, 1.002), (4.8, 0.998), (0.0, 0.998), (-9.0, 0.998)],
)
def test_the_coefficient_moves_with_the_clipped_relative_error(kl: float, factor: float) -> None:
    controller = kl_controller(0.2, target=6.0, horizon=10_000)
    controller.update(kl, samples=100)
    assert controller.value == pytest.approx(0.2 * factor, rel=1e-12)


def test_a_fixed_coefficient_never_moves() -> None:
    controller = kl_controller(0.05, target=None, horizon=10)
    controller.update(1e9, samples=100)
    assert isinstance(controller, FixedKLController)
    assert controller.value == 0.05


@given(st.lists(st.floats(-5, 50), min_size=2, max_size=8), st.integers(1, 7))
def test_a_resumed_controller_walks_the_same_path(kls: list[float], cut: int) -> None:
    whole, first, second = (AdaptiveKLController(0.2, target=6.0, horizon=1000) for _ in range(3))
    for kl in kls:
        whole.update(kl, samples=64)
    for kl in kls[:cut]:
        first.update(kl, samples=64)
    second.load_state_dict(first.state_dict())
    for kl in kls[cut:]:
        second.update(kl, samples=64)
    assert second.value == whole.value


def test_a_step_larger_than_the_horizon_never_makes_the_coefficient_negative():
    controller = kl_controller(0.2, 6.0, 20)
    for _ in range(50):
        controller.update(0.0, 128)
        assert controller.value > 0
