import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.shaping import (
    combine,
    repetition_penalty,
    size_penalty,
    soft_overlong,
    tags_once,
    weighted_mean,
)


def test_combination_and_size_penalty():
    assert combine(1.0, 0.0, 1.0, 0.1) == pytest.approx(1 / 1.1)
    assert size_penalty(5.0, 3.0) == size_penalty(3.0, 5.0) == pytest.approx(0.36)
    mixed = combine(jnp.array([1.0, 0.5]), jnp.array([1.0, 0.0]), 1.0, jnp.array([0.1, 0.0]))
    np.testing.assert_allclose(mixed, [1.0, 0.5], rtol=1e-6)


def test_weighted_mean():
    parts, weights = np.array([[1.0, 0.5], [1.0, 1.0]]), np.array([[1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(weighted_mean(parts, weights), [0.625, 0])
    np.testing.assert_allclose(jax.jit(weighted_mean)(parts, weights), [0.625, 0])


def test_tags_once():
    counts = np.array([[1, 1, 1, 1], [1, 2, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(jax.jit(tags_once)(counts), [1, 0.5, 0])


def test_soft_overlong_is_dapos():
    length = np.array([0, 16384, 18432, 20480, 30000])
    found = jax.jit(lambda n: soft_overlong(n, longest=20480, cushion=4096))(length)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
    with pytest.raises(ValueError, match="cushion=5, longest=4"):
        soft_overlong(length, longest=4, cushion=5)


def by_sets(tokens, n):
    grams = [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]
    return -(len(grams) - len(set(grams))) / max(len(grams), 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_repetition_penalty_equals_a_set_of_n_grams(n):
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, 3, (20, 30)).astype(np.int32)
    tokens[0] = 150_000
    lengths = rng.integers(0, 31, 20)
    mask = np.arange(30) < lengths[:, None]
    expected = [by_sets(row[:k].tolist(), n) for row, k in zip(tokens, lengths, strict=True)]
    np.testing.assert_allclose(repetition_penalty(tokens, mask, n), expected, atol=1e-12)
    found = jax.jit(repetition_penalty, static_argnums=2)(tokens, mask, n)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert min(expected) < -0.5


def test_repetition_penalty_of_short_texts():
    assert repetition_penalty(np.zeros((2, 3), np.int32), np.ones((2, 3), bool)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="n=0"):
        repetition_penalty(np.zeros((2, 3), np.int32), np.ones((2, 3), bool), n=0)
