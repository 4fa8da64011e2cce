"""Group-relative advantages (GRPO): a completion is judged against its siblings, no value model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

EPSILON = 1e-6


def group_advantages(
    scores: Float[np.ndarray, "groups n"], valid: Bool[np.ndarray, "groups n"]
) -> Advantages:
    """Scores of each group, centred and scaled by the group's own spread.

        A_i = (R_i − mean(R)) / (std(R) + 1e-6),   std unbiased (N − 1)

    over the *valid* completions of the group. A failed verification (`valid` false) stays out of
    the baseline and gets advantage 0 and weight 0; its score is not read. So does everything in a
    group with fewer than two valid completions: nothing to compare with. A group of equal scores
    gets exactly 0 and keeps its weight: its tokens count in the mean over tokens.

    Arrays may be of NumPy or, under `jax.jit`, of JAX.
    """
    xp = scores.__array_namespace__()  # numpy or jax.numpy
    count = valid.sum(-1, keepdims=True)
    usable = valid & (count >= 2)
    known = xp.astype(xp.where(usable, scores, 0.0), float)
    mean = known.sum(-1, keepdims=True) / xp.maximum(count, 1)
    deviation = xp.where(usable, known - mean, 0.0)
    std = xp.sqrt((deviation**2).sum(-1, keepdims=True) / xp.maximum(count - 1, 1))
    lowest = xp.where(usable, scores, xp.inf).min(-1)
    highest = xp.where(usable, scores, -xp.inf).max(-1)
    equal = lowest == highest  # exact, where the rounded mean would leave a std of 1e-17
    values = xp.where(equal[:, None], 0.0, deviation / (std + EPSILON))
    values, weights = (xp.astype(each, xp.float32) for each in (values, usable))
    return Advantages(values, weights, equal)


class Advantages(NamedTuple):
    """What `group_advantages` returns."""

    values: Float[np.ndarray, "groups n"]
    weights: Float[np.ndarray, "groups n"]
    """1 where the completion is trained on, else 0."""
    zero_variance: Bool[np.ndarray, " groups"]
    """Groups with two or more valid completions, all of the same score: a metric."""
