import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.arrays import first, masked, ranked, stable_order
from vtriune_jax.rewards.in_turn import in_turn


@pytest.mark.parametrize("shape", [(7,), (5, 20), (2, 3, 9), (4, 1)])
def test_the_order_is_that_of_a_stable_sort(shape):
    values = np.random.default_rng(0).integers(0, 4, shape)
    expected = np.argsort(values, axis=-1, kind="stable")
    np.testing.assert_array_equal(stable_order(values), expected)
    np.testing.assert_array_equal(jax.jit(stable_order)(jnp.asarray(values)), expected)


def test_ranks_compare_as_their_values_do_with_the_first_of_equal_ones_on_top():
    values = np.array([0.5, -1, 0.75, 0.5, 0, np.nextafter(0.5, 1), 0.25])
    thresholds = np.array([0.25, 0.5, 0.75, 0.9, np.nan])
    ranks, least, back = ranked(values, thresholds)
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
    ranks, least, back = ranked(np.full((2, 3), -1.0), np.array([0.0, np.nan]))
    assert (ranks == -1).all()
    assert not (ranks.max() >= least).any()
    assert back(ranks).shape == (2, 3)


def test_more_values_than_small_integers_hold():
    values = np.random.default_rng(0).random(40_000)
    ranks, least, _ = ranked(values, np.array([0, 0.5]))
    assert ranks.min() == 0
    np.testing.assert_array_equal(ranks >= least[1], values >= 0.5)


def test_the_first_true_place_is_found():
    mask = np.random.default_rng(0).random((4, 6, 50)) < 0.3
    mask[:, :, 0] = False
    for axis in (0, 1):
        place, index = jax.jit(first, static_argnums=1)(jnp.asarray(mask), axis)
        some = mask.any(axis)
        np.testing.assert_array_equal(np.asarray(index)[some], mask.argmax(axis)[some])
        np.testing.assert_array_equal(place, mask & (mask.cumsum(axis) == 1))


def test_masked_values_are_negative_and_the_others_untouched():
    values, mask = np.linspace(0, 1, 11, dtype=np.float32), np.arange(11) % 2 == 0
    for found in (masked(values, mask), masked(jnp.asarray(values), jnp.asarray(mask))):
        np.testing.assert_array_equal(np.asarray(found)[mask], values[mask])
        assert (np.asarray(found)[~mask] < 0).all()


@pytest.mark.parametrize("columns", [3, 32, 33, 70])
def test_rows_choose_in_turn(columns):
    """More columns than fit into one word of the bit mask, ties, and thresholds of all kinds."""
    rng = np.random.default_rng(columns)
    values = rng.integers(-9, 11, (20, columns, 30)) / 10
    least = rng.choice([0, 0.1, 0.5, 1.0, np.nan], (4, 30))
    expected = np.full((20, 4, 30), -1.0)
    for t, b in np.ndindex(4, 30):
        free = np.ones(columns, bool)
        for row in range(20):
            open_ = np.where(
                free & (values[row, :, b] >= max(least[t, b], 0)), values[row, :, b], -1
            )
            if open_.max() >= 0:
                expected[row, t, b] = open_.max()
                free[open_.argmax()] = False
    np.testing.assert_array_equal(in_turn(values, least), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(in_turn)(values, least), expected)
