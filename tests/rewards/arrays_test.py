import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.arrays import comparable, largest, stable_order


@pytest.mark.parametrize("shape", [(7,), (5, 20), (2, 3, 9), (4, 1)])
def test_the_order_is_that_of_a_stable_sort(shape):
    values = np.random.default_rng(0).integers(0, 4, shape)
    expected = np.argsort(values, axis=-1, kind="stable")
    np.testing.assert_array_equal(stable_order(values), expected)
    np.testing.assert_array_equal(jax.jit(stable_order)(jnp.asarray(values)), expected)


def test_ranks_compare_as_their_values_do_with_the_first_of_equal_ones_on_top():
    values = np.array([0.5, -1, 0.75, 0.5, 0, np.nextafter(0.5, 1), 0.25])
    thresholds = np.array([0.25, 0.5, 0.75, 0.9, np.nan])
    ranks, least, back = comparable(values, thresholds)
    assert ranks.dtype.kind == "i"
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            ranks >= least[:, None], values >= thresholds[:, None], "a threshold is reached or not"
        )
    assert ranks[0] > ranks[3]
    assert ranks.tolist().count(-1) == 2
    reaching = values >= 0.25
    np.testing.assert_array_equal(back(ranks)[reaching], values[reaching])


def test_without_any_value_nothing_is_reached():
    ranks, least, back = comparable(np.full((2, 3), -1.0), np.array([0.0, np.nan]))
    assert (ranks == -1).all()
    assert not (ranks.max() >= least).any()
    assert back(ranks).shape == (2, 3)


def test_more_values_than_small_integers_hold():
    values = np.random.default_rng(0).random(40_000)
    ranks, least, _ = comparable(values, np.array([0, 0.5]))
    assert ranks.min() == 0
    np.testing.assert_array_equal(ranks >= least[1], values >= 0.5)


def test_the_largest_is_found_at_its_first_place_by_both_libraries():
    values = np.array([[0.5, 0.25, -1], [0.75, 0.25, -1], [0.75, 0.5, -1]])
    usable = np.array([[True, True, True], [True, True, True], [True, False, True]])
    ranks, _, back = comparable(values, np.array([0.0]))
    best, place = largest(ranks, usable)
    plain, at = jax.jit(largest)(jnp.asarray(values), jnp.asarray(usable))
    np.testing.assert_array_equal(back(best)[:2], [0.75, 0.25])
    np.testing.assert_allclose(plain, [0.75, 0.25, -1])
    assert best[2] == -1
    for mask in (place, at):
        assert np.argwhere(np.asarray(mask)[:, :2].T).tolist() == [[0, 1], [1, 0]]
