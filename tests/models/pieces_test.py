import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.models.pieces import map_rows, split_rows


def test_a_piece_is_every_kth_row():
    split = split_rows({"a": jnp.arange(12).reshape(6, 2)}, 3)["a"]
    assert split[1].tolist() == [[2, 3], [8, 9]]


@pytest.mark.parametrize("pieces", [1, 2, 6])
def test_the_result_is_in_the_order_of_the_rows(pieces):
    rows, seen = jnp.arange(12.0).reshape(6, 2), []

    def function(tree):
        seen.append(len(tree["a"]))
        return tree["a"] ** 2 + tree["b"][:, None]

    found = map_rows(function, {"a": rows, "b": rows[:, 0]}, pieces)
    np.testing.assert_array_equal(found, rows**2 + rows[:, :1])
    assert set(seen) == {6 // pieces}


def test_rows_may_be_empty():
    rows = jnp.zeros((6, 0, 3))
    assert split_rows(rows, 2).shape == (2, 3, 0, 3)
    assert map_rows(lambda x: x[..., :2], rows, 2).shape == (6, 0, 2)
