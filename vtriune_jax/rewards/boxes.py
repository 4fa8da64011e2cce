"""Axis-aligned boxes (x1, y1, x2, y2), padded to a static number with a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int

from vtriune_jax.rewards.arrays import Array, batch_first, batch_last, namespace


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


def pairs_of_labels(
    left: Boxes, right: Boxes
) -> tuple[Bool[Array, "*batch m n"], Bool[Array, "*batch m n"]]:
    """Which pairs are real, i.e. not of the padding, and which of them have equal labels."""
    masks, labels = (
        (batch_last(a, 1)[:, None], batch_last(b, 1))
        for a, b in ((left.mask, right.mask), (left.labels, right.labels))
    )
    real = masks[0] & masks[1]
    same = real & (labels[0] == labels[1])
    return batch_first(real, left.mask.shape[:-1]), batch_first(same, left.mask.shape[:-1])


def pairwise_iou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """Intersection over union of every box on the left with every box on the right.

    0 where two boxes do not overlap with a positive extent; boxes without area overlap nothing.
    """
    a, b = _corners(left, right)
    return batch_first(_iou_and_union(a, b)[0], left.shape[:-2])


def pairwise_giou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """GIoU = IoU − (C − U) / C (Rezatofighi 2019), C: area of the smallest box around both.

    In (−1, 1]: boxes apart are told by how far. Where C is 0 nothing is subtracted.
    """
    a, b = _corners(left, right)
    iou, union = _iou_and_union(a, b)
    width, height = _around(a, b)
    around = width * height
    return batch_first(iou - _ratio(around - union, around), left.shape[:-2])


def pairwise_diou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """DIoU = IoU − ρ² / c²: centres' distance, diagonal of the box around both (Zheng 2020)."""
    a, b = _corners(left, right)
    return batch_first(_iou_and_union(a, b)[0] - _centre_penalty(a, b), left.shape[:-2])


def pairwise_ciou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """CIoU = DIoU − α·v, which wants equal shapes, too (Zheng 2020).

    v = 4/π² · (atan(w/h) − atan(w'/h'))², α = v / (1 − IoU + v).
    """
    xp = namespace(left)
    a, b = _corners(left, right)
    iou = _iou_and_union(a, b)[0]
    left_angle, right_angle = (xp.atan2(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (a, b))
    v = 4 / math.pi**2 * (left_angle - right_angle) ** 2
    ciou = iou - _centre_penalty(a, b) - _ratio(v * v, 1 - iou + v)
    return batch_first(ciou, left.shape[:-2])


def contains(
    boxes: Float[Array, "*batch m 4"], points: Float[Array, "*batch n 2"]
) -> Bool[Array, "*batch m n"]:
    """Whether each box contains each point (x, y), its border included."""
    a, b = boxes[..., :, None, :], points[..., None, :, :]
    inside = (a[..., :2] <= b) & (b <= a[..., 2:])
    return inside[..., 0] & inside[..., 1]


def _corners(left: Array, right: Array) -> tuple[list[Array], list[Array]]:
    """x1, y1, x2, y2 of the left boxes [m, 1, batch] and of the right ones [n, batch]."""
    a, b = batch_last(left, 2), batch_last(right, 2)
    return [a[:, None, k] for k in range(4)], [b[:, k] for k in range(4)]


def _iou_and_union(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
    xp = namespace(a[0])
    width, height = (
        xp.maximum(xp.minimum(a[k + 2], b[k + 2]) - xp.maximum(a[k], b[k]), 0) for k in range(2)
    )
    inter = width * height
    areas = [xp.maximum(s[2] - s[0], 0) * xp.maximum(s[3] - s[1], 0) for s in (a, b)]
    union = areas[0] + areas[1] - inter
    return inter / xp.where(inter > 0, union, 1), union


def _around(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
    """Width and height of the smallest box around each pair."""
    xp = namespace(a[0])
    width, height = (xp.maximum(a[k + 2], b[k + 2]) - xp.minimum(a[k], b[k]) for k in range(2))
    return width, height


def _centre_penalty(a: Sequence[Array], b: Sequence[Array]) -> Array:
    width, height = _around(a, b)
    x, y = ((a[k] + a[k + 2]) / 2 - (b[k] + b[k + 2]) / 2 for k in range(2))
    return _ratio(x * x + y * y, width * width + height * height)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is."""
    xp = namespace(numerator)
    positive = denominator > 0
    return xp.where(positive, numerator / xp.where(positive, denominator, 1), 0)
