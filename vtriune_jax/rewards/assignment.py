"""The optimal matching, where the greedy ones of `matching` depend on the order of the boxes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from optax.assignment import hungarian_algorithm

from vtriune_jax.rewards.matching import Match


def optimal(
    iou: Float[Array, "*batch p g"],
    same_label: Bool[Array, "*batch p g"],
    thresholds: Float[Array, "*batch t"],
) -> Match:
    """The one-to-one matching of equal labels with the largest sum of IoUs, at each threshold.

    Pairs whose IoU is below the threshold, or 0, are not matched. Hungarian algorithm: O(n³), and
    for JAX only; meant for tens of boxes.
    """

    def at(iou: Array, same_label: Array, threshold: Array) -> Match:
        worth = jnp.where(same_label & (iou >= threshold), iou, 0.0)
        chosen = worth[hungarian_algorithm(-worth)]
        return Match(chosen.sum(), (chosen > 0).sum().astype(iou.dtype))

    each: Callable[..., Match] = jax.vmap(at, in_axes=(None, None, 0))
    for _ in iou.shape[:-2]:
        each = jax.vmap(each)
    return each(iou, same_label, thresholds)
