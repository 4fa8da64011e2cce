"""Optimal matching against SciPy; matchings in NumPy and JAX; ties."""

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vtriune_jax.rewards.assignment import optimal
from vtriune_jax.rewards.matching import completeness, iou_first, label_first

THRESHOLDS = np.array([1e-30, 0.5, 0.9])


@pytest.fixture
def matrices():
    """IoUs of few values, so that they tie; equal labels; real pairs: [40, 7, 5]."""
    rng = np.random.default_rng(0)
    iou = rng.integers(0, 11, (40, 7, 5)) / 10
    real = (rng.random((40, 7, 1)) < 0.9) & (rng.random((40, 1, 5)) < 0.9)
    return iou, real & (rng.random(iou.shape) < 0.6), real, np.tile(THRESHOLDS, (40, 1))


def by_scipy(iou, same, threshold):
    worth = np.where(same & (iou >= threshold), iou, 0)
    chosen = worth[linear_sum_assignment(worth, maximize=True)]
    return chosen.sum()


def test_optimal_equals_scipy_and_beats_the_greedy_ones(matrices):
    iou, same, real, thresholds = matrices
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, jax.jit(optimal)(iou, same, thresholds))
        alone = jax.jit(optimal)(iou[3], same[3], thresholds[3])
    expected = [[by_scipy(i, s, t) for t in THRESHOLDS] for i, s in zip(iou, same, strict=True)]
    np.testing.assert_allclose(found.credit, expected, atol=1e-12)
    np.testing.assert_array_equal(alone.credit, found.credit[3])
    greedy = label_first(iou, same, thresholds).credit
    assert (found.credit >= greedy - 1e-12).all()
    assert (found.credit > greedy + 0.05).any()
    assert (found.credit >= iou_first(iou, same, real, thresholds).credit - 1e-12).all()


@pytest.mark.parametrize("match", [label_first, iou_first], ids=["label_first", "iou_first"])
def test_numpy_jax_and_vmap_agree(matrices, match):
    iou, same, real, thresholds = matrices
    args = (iou, same, thresholds) if match is label_first else (iou, same, real, thresholds)
    reference = match(*args)
    with jax.enable_x64(True):
        for found in (jax.jit(match)(*args), jax.jit(jax.vmap(match))(*args)):
            np.testing.assert_allclose(found.credit, reference.credit, atol=1e-12)
            np.testing.assert_array_equal(found.count, reference.count)
    deep = match(*(x.reshape(4, 10, *x.shape[1:]) for x in args))
    np.testing.assert_array_equal(deep.credit.reshape(40, 3), reference.credit)


def test_ties_go_to_the_first():
    iou = np.full((2, 2), 0.7)
    first_is_equal = np.array([[True, False], [False, False]])
    second_is_equal = ~first_is_equal
    every = np.ones((2, 2), bool)
    at = np.array([0.5])
    # both pairs (0, 0) and (1, 1) are matched; only one has equal labels
    assert iou_first(iou, first_is_equal, every, at).credit == pytest.approx([0.7])
    assert iou_first(iou, second_is_equal & np.eye(2, dtype=bool), every, at).credit == [0.7]
    assert iou_first(iou, second_is_equal & ~np.eye(2, dtype=bool), every, at).credit == [0]
    assert iou_first(iou, every, every, at).count == [2]
    # the first true box takes the first prediction, which alone the second one could take
    same = np.array([[True, True], [True, False]])
    assert label_first(iou, same, at).count == [1]


def test_a_chain_of_conflicts_is_resolved_from_the_best_pair_on():
    """Each pair is in the way of the next: one is matched per round."""
    n = 6
    iou = np.zeros((n, n))
    for k in range(n):
        iou[k, k] = 0.9 - 0.1 * k
        if k + 1 < n:
            iou[k, k + 1] = 0.85 - 0.1 * k
    every = np.ones((n, n), bool)
    found = iou_first(iou, every, every, np.array([0.1]))
    assert found.credit == pytest.approx([np.diagonal(iou).sum()])


def test_completeness_is_the_mean_of_precision_and_recall():
    found = completeness(np.array([2.0]), np.array(4.0), np.array(3.0))
    assert found == pytest.approx([1 - (1 / 3 + 2 / 4) / 2])
    assert completeness(np.array([0.0]), np.array(0.0), np.array(0.0)) == [0]
