"""Which token comes next: the right one, with the right log-prob, as often as it should."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vtriune_jax.rollout import choice
from vtriune_jax.rollout.choice import BLOCK, Sampling


def test_truncation():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))

    def kept(top_k, top_p):
        return np.isfinite(choice.truncate(logits, top_k, top_p)).nonzero()[0].tolist()

    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(0, 0.65) == [1, 3]
    assert kept(0, 0.0) == [1]
    # After top-k the rest is 4:3 of 0.7, so that 0.5 < 4/7 is reached by one token.
    assert kept(2, 0.5) == [1]
    assert kept(9, 1.0) == [0, 1, 2, 3]


def test_frequencies_follow_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])) * 2
    many = 4000
    ids, logps = choice.next_token(
        jnp.tile(logits, (1, many, 1)),
        jax.random.split(jax.random.key(0), many)[None],
        jnp.zeros((), jnp.int32),
        (0,),
        Sampling(max_tokens=1, temperature=2.0),
    )
    shares = np.bincount(ids[0], minlength=4) / many
    np.testing.assert_allclose(shares, np.array([0, 4, 2, 3]) / 9, atol=0.03)
    np.testing.assert_allclose(
        np.exp(logps[0, :9]), np.array([0, 4, 2, 3])[ids[0, :9]] / 9, rtol=1e-5
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.3, 1.0, 5.0]), min_size=4, max_size=4),
    repeats=st.sampled_from([1, 31, 32, 33, 100]),
)
def test_an_id_is_picked_where_the_running_sum_exceeds_the_number(weights, repeats):
    weights = np.array((weights * repeats), np.float32)
    if not weights.any():
        weights[-1] = 1.0
    uniform = np.concatenate([np.linspace(0, 1, 200, endpoint=False), [np.nextafter(1, 0)]])
    uniform = uniform.astype(np.float32)
    ids = np.asarray(choice.pick(jnp.tile(weights, (len(uniform), 1)), jnp.asarray(uniform)))
    assert (weights[ids] > 0).all()
    ends = np.cumsum(weights, dtype=np.float64)
    slack = 1e-5 * ends[-1]
    assert (ends[ids] >= uniform * ends[-1] - slack).all()
    assert (ends[ids] - weights[ids] <= uniform * ends[-1] + slack).all()


def test_blocks_are_drawn_as_often_as_they_weigh():
    many, vocab = 4000, 3 * BLOCK - 5
    weights = np.zeros(vocab, np.float32)
    weights[[3, BLOCK - 1, BLOCK, 2 * BLOCK + 7, vocab - 1]] = [1, 2, 3, 0.5, 3.5]
    ids = choice.pick(jnp.tile(weights, (many, 1)), jax.random.uniform(jax.random.key(1), (many,)))
    shares = np.bincount(ids, minlength=vocab) / many
    np.testing.assert_allclose(shares, weights / 10, atol=0.03)
