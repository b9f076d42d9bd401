"""Best-of-k and pass@k from n >= k samples per prompt, without bias.

The mean over all subsets of k of the n samples has a closed form: the sample of rank i in ascending order is the best of
C(i - 1, k - 1) of the C(n, k) subsets. For scores of 0 or 1 this is pass@k, equation 1 of Chen et al. (2021).
"""

from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray


def best_of(scores: ArrayLike, k: int, *, chosen_by: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return the expected score of the best of k samples per prompt.

    Args:
        scores: float [P, n], of n independent samples of P prompts.
        k: number of samples, 1 <= k <= n.
        chosen_by: float [P, n], the criterion of the best; the scores when not given. Ties go to the later sample, which is
            unbiased, because samples are independent.

    Returns:
        Float64 [P]; its mean over prompts is best-of-k.

    Raises:
        ValueError: k is not between 1 and n.
    """
    values = np.asarray(scores, dtype=np.float64)
    tries = values.shape[1]
    if not 1 <= k <= tries:
        raise ValueError(f"k {k}: expected 1 to {tries}, the number of tries")
    order = np.argsort(values if chosen_by is None else np.asarray(chosen_by), axis=1, kind="stable")
    weights = np.array([comb(place, k - 1) / comb(tries, k) for place in range(tries)])
    expected: NDArray[np.float64] = np.take_along_axis(values, order, axis=1) @ weights
    return expected


def pass_at(scores: ArrayLike, k: int, *, right_from: float = 1.0) -> NDArray[np.float64]:
    """Return pass@k per prompt, float64 [P]; see `best_of`.

    Args:
        scores: float [P, n].
        k: number of samples, 1 <= k <= n.
        right_from: minimum score of a correct sample.

    Raises:
        ValueError: k is not between 1 and n.
    """
    return best_of(np.asarray(scores) >= right_from, k)


def powers_of_two(tries: int) -> list[int]:
    """Return the reported k: 1, 2, 4, ... below `tries`, and `tries`."""
    return [*(1 << bit for bit in range(tries.bit_length()) if 1 << bit < tries), tries]
