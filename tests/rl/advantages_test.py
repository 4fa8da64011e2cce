import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune_jax.rl.advantages import group_advantages

KINDS = ["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"]


def advantages(scores, valid=None, kind="grpo"):
    scores = np.array(scores, np.float32)
    return group_advantages(scores, np.ones(scores.shape, bool) if valid is None else valid, kind)


def by_hand(scores, valid, kind):
    """Completion by completion, with lists of who is compared with whom."""
    groups = [
        [float(s) for s, ok in zip(*row, strict=True) if ok]
        for row in zip(scores, valid, strict=True)
    ]
    everyone = [score for group in groups for score in group]
    distances = [s - sum(g) / len(g) for g in groups if len(g) > 1 for s in g]
    values, weights = np.zeros(scores.shape), np.zeros(scores.shape)
    for g, i in np.argwhere(valid):
        score, group = float(scores[g, i]), everyone if kind == "reinforce++" else groups[g]
        if len(group) < 2:
            continue
        weights[g, i] = 1
        rest = (sum(group) - score) / (len(group) - 1)
        mean = sum(group) / len(group)
        everywhere = distances if kind == "reinforce++_baseline" else everyone
        values[g, i] = score - (rest if kind == "rloo" else mean)
        if kind == "grpo":
            values[g, i] /= np.std(group, ddof=1) + 1e-6
        elif kind.startswith("reinforce++"):
            values[g, i] /= np.std(everywhere, ddof=1) + 1e-6
    return values, weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_its_name_says(kind):
    rng = np.random.default_rng(1)
    scores = rng.random((6, 4)).astype(np.float32)
    valid = rng.random(scores.shape) < 0.7
    valid[0], valid[1], scores[2] = [False] * 4, [True, False, False, False], 0.5
    wrong = np.where(valid, scores, np.nan)
    found = advantages(wrong, valid, kind)
    values, weights = by_hand(scores, valid, kind)
    np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.weights, weights)
    np.testing.assert_array_equal(found.zero_variance, [k == 2 for k in range(6)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_equal_scores_gives_exactly_zero(kind):
    result = advantages([[0.1] * 3] * 3, kind=kind)
    np.testing.assert_array_equal(result.values, 0.0)
    np.testing.assert_array_equal(result.weights, 1.0)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x64", [False, True])
def test_jitted_they_are_the_same(x64, kind):
    rng = np.random.default_rng(0)
    scores = np.vstack([rng.random((6, 4)), np.full((1, 4), 0.1)]).astype(np.float32)
    valid = rng.random(scores.shape) < 0.8
    with jax.enable_x64(x64):
        found = jax.jit(group_advantages, static_argnums=2)(scores, valid, kind)
    for ours, reference in zip(found, group_advantages(scores, valid, kind), strict=True):
        assert ours.dtype == reference.dtype
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_they_are_exact_to_its_last_digits(kind):
    rng = np.random.default_rng(0)
    scores, valid = rng.random((6, 4)), rng.random((6, 4)) < 0.8
    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(group_advantages, (0, 0, None)), static_argnums=2)(
            scores.reshape(2, 3, 4), valid.reshape(2, 3, 4), kind
        )
    halves = [
        group_advantages(s, v, kind) for s, v in ((scores[:3], valid[:3]), (scores[3:], valid[3:]))
    ]
    for ours, *reference in zip(found, *halves, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-12)
