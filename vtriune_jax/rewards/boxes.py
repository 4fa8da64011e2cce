"""Axis-aligned boxes (x1, y1, x2, y2), padded to a static number with a mask."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Bool, Float, Int

from vtriune_jax.rewards.arrays import Array, namespace


class Boxes(NamedTuple):
    """The boxes of one side (predicted or true) of one or more images.

    `labels` are integers that mean the same word on both sides of an image; `mask` is False in the
    padding, where the other two may hold anything finite.
    """

    coords: Float[Array, "*batch boxes 4"]
    labels: Int[Array, "*batch boxes"]
    mask: Bool[Array, "*batch boxes"]


def area(coords: Float[Array, "*batch 4"]) -> Float[Array, "*batch"]:
    """(x2 − x1)(y2 − y1): continuous coordinates, no +1; a box turned inside out has no area."""
    xp = namespace(coords)
    width, height = (coords[..., k + 2] - coords[..., k] for k in range(2))
    return xp.maximum(width, 0) * xp.maximum(height, 0)


def pairwise_iou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """Intersection over union of every box on the left with every box on the right.

    0 where two boxes do not overlap with a positive extent; boxes without area overlap nothing.
    """
    return _iou_and_union(left, right)[0]


def pairwise_giou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """GIoU = IoU − (C − U) / C (Rezatofighi 2019), C: area of the smallest box around both.

    In (−1, 1]: boxes apart are told by how far. Where C is 0 nothing is subtracted.
    """
    iou, union = _iou_and_union(left, right)
    width, height = _around(left, right)
    around = width * height
    return iou - _ratio(around - union, around)


def pairwise_diou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """DIoU = IoU − ρ² / c²: centres' distance, diagonal of the box around both (Zheng 2020)."""
    return pairwise_iou(left, right) - _centre_penalty(left, right)


def pairwise_ciou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """CIoU = DIoU − α·v, which wants equal shapes, too (Zheng 2020).

    v = 4/π² · (atan(w/h) − atan(w'/h'))², α = v / (1 − IoU + v).
    """
    xp = namespace(left)
    iou = pairwise_iou(left, right)
    angle = [
        xp.atan2(side[..., 2] - side[..., 0], side[..., 3] - side[..., 1]) for side in (left, right)
    ]
    v = 4 / math.pi**2 * (angle[0][..., :, None] - angle[1][..., None, :]) ** 2
    return iou - _centre_penalty(left, right) - _ratio(v * v, 1 - iou + v)


def contains(
    boxes: Float[Array, "*batch m 4"], points: Float[Array, "*batch n 2"]
) -> Bool[Array, "*batch m n"]:
    """Whether each box contains each point (x, y), its border included."""
    a, b = boxes[..., :, None, :], points[..., None, :, :]
    inside = (a[..., :2] <= b) & (b <= a[..., 2:])
    return inside[..., 0] & inside[..., 1]


def _iou_and_union(left: Array, right: Array) -> tuple[Array, Array]:
    xp = namespace(left)
    # one axis at a time: NumPy is slow on a last axis of 4
    a = [left[..., :, None, k] for k in range(4)]
    b = [right[..., None, :, k] for k in range(4)]
    width, height = (
        xp.maximum(xp.minimum(a[k + 2], b[k + 2]) - xp.maximum(a[k], b[k]), 0) for k in range(2)
    )
    inter = width * height
    union = area(left)[..., :, None] + area(right)[..., None, :] - inter
    return inter / xp.where(inter > 0, union, 1), union


def _around(left: Array, right: Array) -> tuple[Array, Array]:
    """Width and height of the smallest box around each pair."""
    xp = namespace(left)
    a = [left[..., :, None, k] for k in range(4)]
    b = [right[..., None, :, k] for k in range(4)]
    width, height = (xp.maximum(a[k + 2], b[k + 2]) - xp.minimum(a[k], b[k]) for k in range(2))
    return width, height


def _centre_penalty(left: Array, right: Array) -> Array:
    width, height = _around(left, right)
    centre = [(side[..., :2] + side[..., 2:]) / 2 for side in (left, right)]
    apart = centre[0][..., :, None, :] - centre[1][..., None, :, :]
    return _ratio((apart * apart).sum(-1), width * width + height * height)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is."""
    xp = namespace(numerator)
    positive = denominator > 0
    return xp.where(positive, numerator / xp.where(positive, denominator, 1), 0)
