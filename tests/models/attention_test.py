"""Segments, causality and padding of the one attention function."""

import jax
import jax.numpy as jnp
import numpy as np

from vtriune_jax.models.attention import attention


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def naive(query, key, value, segments, causal):
    """Token by token, head by head."""
    out = np.zeros(query.shape, np.float32)
    rows, tokens, heads, head_dim = query.shape
    for row, t, head in np.ndindex(rows, tokens, heads):
        seen = [
            s
            for s in range(t + 1 if causal else tokens)
            if segments[row, s] == segments[row, t] != 0
        ]
        if seen:
            kv_head = head // (heads // key.shape[2])
            scores = key[row, seen, kv_head] @ query[row, t, head] / head_dim**0.5
            weights = np.exp(scores - scores.max())
            out[row, t, head] = weights @ value[row, seen, kv_head] / weights.sum()
    return out


def test_segments_and_grouped_heads():
    segments = np.array([[0, 0, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 3, 0]])
    query, key, value = random(2, 7, 4, 8), random(2, 7, 2, 8) + 1, random(2, 7, 2, 8) - 1
    run = jax.jit(attention, static_argnames="causal")
    for causal in (False, True):
        ours = run(query, key, value, jnp.asarray(segments), causal=causal)
        expected = naive(*map(np.asarray, (query, key, value)), segments, causal)
        real = segments != 0
        np.testing.assert_allclose(ours[real], expected[real], atol=1e-6)
        assert np.isfinite(ours).all()


def test_gradients_are_finite_in_the_padding():
    segments = jnp.asarray([[0, 0, 0, 1, 1]])

    @jax.jit
    @jax.grad
    def gradient(query):
        return attention(query, query, query, segments, causal=True).sum()

    assert np.isfinite(gradient(random(1, 5, 2, 4))).all()
