import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.boxes import (
    area,
    contains,
    pairwise_ciou,
    pairwise_diou,
    pairwise_giou,
    pairwise_iou,
)


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


def by_hand(a, b):
    """(GIoU, DIoU, CIoU) of two boxes, in scalars."""
    inter = math.prod(max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in range(2))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inter
    iou = inter / union
    size = [max(a[k + 2], b[k + 2]) - min(a[k], b[k]) for k in range(2)]
    giou = iou - (math.prod(size) - union) / math.prod(size)
    apart = sum(((a[k] + a[k + 2] - b[k] - b[k + 2]) / 2) ** 2 for k in range(2))
    diou = iou - apart / (size[0] ** 2 + size[1] ** 2)
    angle = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    v = 4 / math.pi**2 * (angle[0] - angle[1]) ** 2
    return giou, diou, diou - (v / (1 - iou + v) * v if v else 0)


def test_generalised_ious_are_the_papers():
    rng = np.random.default_rng(0)
    left, right = rng.uniform(0, 50, (2, 3, 6, 4))
    for side in (left, right):
        side[..., 2:] = side[..., :2] + rng.uniform(1, 30, (3, 6, 2))
    right[:, 0] = left[:, 0]
    expected = np.array(
        [[[by_hand(a, b) for b in rs] for a in ls] for ls, rs in zip(left, right, strict=True)]
    )
    for k, function in enumerate((pairwise_giou, pairwise_diou, pairwise_ciou)):
        np.testing.assert_allclose(function(left, right), expected[..., k], atol=1e-12)
        with jax.enable_x64(True):
            found = jax.jit(jax.vmap(function))(left, right)
        np.testing.assert_allclose(found, expected[..., k], atol=1e-12)


@pytest.mark.parametrize("function", [pairwise_giou, pairwise_diou, pairwise_ciou])
def test_boxes_without_area_give_finite_numbers(function):
    point, other = np.zeros((1, 4)), np.array([[5.0, 5, 5, 5]])
    assert function(point, point) == pytest.approx(np.zeros((1, 1)))
    assert -2 <= function(point, other)[0, 0] <= 0


def test_points_in_boxes():
    boxes = jnp.array([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    points = jnp.array([[0.0, 10], [25, 35], [25, 41], [-1, 5]])
    expected = [[True, False, False, False], [False, True, False, False]]
    np.testing.assert_array_equal(jax.jit(contains)(boxes, points), expected)
    assert jax.vmap(contains)(boxes[None], points[None]).shape == (1, 2, 4)
