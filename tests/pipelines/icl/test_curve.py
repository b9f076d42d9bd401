"""Points of a curve from scored answers."""

import numpy as np
import pytest

from rayrlhf.pipelines.icl.curve import curve


def row(source, k, score, *, ablation="none", copying=0.0, shown=None, dropped=0):
    return {
        "ablation": ablation,
        "k": k,
        "source": source,
        "score": score,
        "copying": copying,
        "shown": k if shown is None else shown,
        "dropped": dropped,
    }


def test_a_point_is_the_mean_over_questions_of_their_means_over_seeds():
    rows = [row(0, 2, 1.0), row(0, 2, 0.0), row(1, 2, 1.0), row(1, 2, 1.0), row(2, 2, 0.0)]
    [point] = curve("base", rows)
    assert (point.model, point.ablation, point.k, point.questions) == ("base", "none", 2, 3)
    assert point.mean == pytest.approx(np.mean([0.5, 1.0, 0.0]))
    assert point.low < point.mean < point.high


def test_the_interval_does_not_shrink_with_seeds_that_all_say_the_same():
    few = [row(source, 0, float(source % 2)) for source in range(20)]
    assert curve("m", few * 8)[0].low == pytest.approx(curve("m", few)[0].low, abs=0.02)


def test_ablations_and_counts_are_points_of_their_own_with_what_was_shown():
    rows = [row(0, 0, 0.0), row(0, 4, 1.0, copying=0.25, shown=3, dropped=1), row(0, 4, 0.5, ablation="flip")]
    points = {(point.ablation, point.k): point for point in curve("m", rows)}
    assert set(points) == {("none", 0), ("none", 4), ("flip", 4)}
    assert points["none", 4].copying == 0.25
    assert (points["none", 4].shown, points["none", 4].dropped) == (3.0, 1)
