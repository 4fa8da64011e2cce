import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune_jax.rl.advantages import group_advantages


def advantages(scores, valid=None):
    scores = np.array(scores, np.float32)
    return group_advantages(scores, np.ones(scores.shape, bool) if valid is None else valid)


def test_matches_the_equation():
    scores = np.array([[0.0, 1.0, 1.0, 0.5], [0.2, 0.1, 0.9, 0.3]], np.float32)
    expected = (scores - scores.mean(-1, keepdims=True)) / (
        scores.std(-1, ddof=1, keepdims=True) + 1e-6
    )
    result = advantages(scores)
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.weights, 1.0)
    assert not result.zero_variance.any()


def test_a_failed_verification_is_out_of_the_baseline_and_the_loss():
    valid = np.array([[True, True, False, True]])
    result = advantages([[0.0, 1.0, np.nan, 0.5]], valid)
    alone = advantages([[0.0, 1.0, 0.5]])
    np.testing.assert_array_equal(result.values[0, [0, 1, 3]], alone.values[0])
    assert result.values[0, 2] == 0.0
    np.testing.assert_array_equal(result.weights, valid)


@pytest.mark.parametrize("valid", [[False, False], [False, True]])
def test_nothing_to_compare_with(valid):
    result = advantages([[3.0, 1.0]], np.array([valid]))
    np.testing.assert_array_equal(result.values, 0.0)
    np.testing.assert_array_equal(result.weights, 0.0)
    assert not result.zero_variance[0]


def test_equal_scores_give_exactly_zero_and_are_counted():
    result = advantages([[0.1] * 3, [0.1, 0.1, 0.2]])
    np.testing.assert_array_equal(result.values[0], 0.0)
    np.testing.assert_array_equal(result.weights, 1.0)
    np.testing.assert_array_equal(result.zero_variance, [True, False])


@given(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=8), st.floats(0.25, 4.0, width=16))
def test_the_scale_and_offset_of_rewards_do_not_matter(scores, scale):
    base, moved = advantages([scores]), advantages([np.array(scores) * scale + 1.0])
    if np.ptp(scores) > 0.05:
        np.testing.assert_allclose(base.values, moved.values, atol=1e-3)
    assert abs(base.values.sum()) < 1e-3


@pytest.mark.parametrize("x64", [False, True])
def test_jitted_they_are_the_same(x64):
    rng = np.random.default_rng(0)
    scores = np.vstack([rng.random((6, 4)), np.full((1, 4), 0.1)]).astype(np.float32)
    valid = rng.random(scores.shape) < 0.8
    with jax.enable_x64(x64):
        found = jax.jit(group_advantages)(scores, valid)
    for ours, reference in zip(found, group_advantages(scores, valid), strict=True):
        assert ours.dtype == reference.dtype
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)
