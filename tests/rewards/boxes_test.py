import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.boxes import area, pairwise_iou


def test_iou_by_hand():
    left = jnp.array([[0.0, 0, 10, 10], [5.0, 5, 5, 5], [20.0, 20, 30, 30]])
    right = jnp.array([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [10.0, 0, 20, 10]])
    expected = [[1, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(pairwise_iou(left, right), expected)


def test_iou_is_symmetric_and_broadcasts_over_batches():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 50, (2, 3, 5, 4))
    boxes[..., 2:] += boxes[..., :2]
    with jax.enable_x64(True):
        iou = np.asarray(pairwise_iou(jnp.asarray(boxes), jnp.asarray(boxes)))
    assert iou.shape == (2, 3, 5, 5)
    np.testing.assert_allclose(iou, iou.swapaxes(-1, -2), rtol=1e-15)
    np.testing.assert_allclose(np.diagonal(iou, axis1=-2, axis2=-1), 1)


def test_a_box_turned_inside_out_has_no_area_and_overlaps_nothing():
    box = jnp.array([[10.0, 10, 0, 0]])
    assert area(box) == pytest.approx([0.0])
    assert pairwise_iou(box, box) == pytest.approx(np.zeros((1, 1)))
