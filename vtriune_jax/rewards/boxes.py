"""Axis-aligned boxes (x1, y1, x2, y2), padded to a static number with a mask."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    size = jnp.maximum(coords[..., 2:] - coords[..., :2], 0)
    return size[..., 0] * size[..., 1]


def pairwise_iou(
    left: Float[Array, "*batch m 4"], right: Float[Array, "*batch n 4"]
) -> Float[Array, "*batch m n"]:
    """Intersection over union of every box on the left with every box on the right.

    0 where two boxes do not overlap with a positive extent; boxes without area overlap nothing.
    """
    a, b = left[..., :, None, :], right[..., None, :, :]
    overlap = jnp.concatenate(
        [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1
    )
    inter = area(overlap)
    union = area(a) + area(b) - inter
    return jnp.where(inter > 0, inter / jnp.where(inter > 0, union, 1), 0)
