"""Advantages of completions: each is judged against its siblings, or the batch; no value model."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

EPSILON = 1e-6

Kind = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"]


def group_advantages(
    scores: Float[np.ndarray, "groups n"],
    valid: Bool[np.ndarray, "groups n"],
    kind: Kind = "grpo",
) -> Advantages:
    """Scores R of the completions, centred and, for some kinds, scaled by a spread.

        grpo                  A_i = (R_i − mean(R)) / (std(R) + 1e-6)         over the group
        dr_grpo               A_i = R_i − mean(R)                             over the group
        rloo                  A_i = R_i − mean of the other R = N/(N − 1) · (R_i − mean(R))
        reinforce++           A_i = (R_i − mean(R)) / (std(R) + 1e-6)         over the batch
        reinforce++_baseline  A_i = D_i / (std(D) + 1e-6) over the batch, D_i = R_i − the group's
                              mean, whose mean is 0

    std is unbiased (N − 1), and every statistic is over the *valid* completions. A failed
    verification (`valid` false) is in none of them and gets advantage 0 and weight 0; its score is
    not read. So does what has no valid sibling to be compared with: in the group, or for
    "reinforce++" in the batch. Equal scores (of a group; of the batch for "reinforce++") get
    exactly 0 and keep their weight: their tokens count in the mean over tokens.

    Arrays may be of NumPy or, under `jax.jit`, of JAX, and values are as exact as the scores;
    `kind` is static.
    """
    xp = scores.__array_namespace__()  # numpy or jax.numpy
    grouped = _centred(scores, valid)
    whole = kind == "reinforce++"
    centred = _centred(scores.reshape(1, -1), valid.reshape(1, -1)) if whole else grouped
    deviation, usable, equal, spread = centred
    if kind == "dr_grpo":
        values = deviation
    elif kind == "rloo":
        count = usable.sum(-1, keepdims=True)
        values = deviation * count / xp.maximum(count - 1, 1)
    elif kind == "reinforce++_baseline":
        values = deviation / (xp.sqrt(_variance(deviation, usable, None)) + EPSILON)
    else:
        values = deviation / (spread + EPSILON)
    values = xp.where(equal, 0.0, values)
    dtype = xp.result_type(scores.dtype, xp.float32)
    values, weights = (xp.astype(x.reshape(scores.shape), dtype) for x in (values, usable))
    return Advantages(values, weights, grouped.equal[:, 0])


class Advantages(NamedTuple):
    """What `group_advantages` returns."""

    values: Float[np.ndarray, "groups n"]
    weights: Float[np.ndarray, "groups n"]
    """1 where the completion is trained on, else 0."""
    zero_variance: Bool[np.ndarray, " groups"]
    """Groups with two or more valid completions, all of the same score: a metric."""


class _Centred(NamedTuple):
    deviation: Float[np.ndarray, "groups n"]
    usable: Bool[np.ndarray, "groups n"]
    equal: Bool[np.ndarray, "groups 1"]
    std: Float[np.ndarray, "groups 1"]


def _centred(
    scores: Float[np.ndarray, "groups n"], valid: Bool[np.ndarray, "groups n"]
) -> _Centred:
    """Deviations from the mean of each row, its spread, and whether its scores are all the same."""
    xp = scores.__array_namespace__()
    count = valid.sum(-1, keepdims=True)
    usable = valid & (count >= 2)
    known = xp.astype(xp.where(usable, scores, 0.0), float)
    mean = known.sum(-1, keepdims=True) / xp.maximum(count, 1)
    deviation = xp.where(usable, known - mean, 0.0)
    lowest = xp.where(usable, scores, xp.inf).min(-1, keepdims=True)
    highest = xp.where(usable, scores, -xp.inf).max(-1, keepdims=True)
    equal = lowest == highest  # exact, where the rounded mean would leave a std of 1e-17
    return _Centred(deviation, usable, equal, xp.sqrt(_variance(deviation, usable, -1)))


def _variance(
    deviation: Float[np.ndarray, "groups n"], usable: Bool[np.ndarray, "groups n"], axis: int | None
) -> Float[np.ndarray, "groups 1"]:
    xp = deviation.__array_namespace__()
    count = usable.sum(axis, keepdims=True)
    return (deviation**2).sum(axis, keepdims=True) / xp.maximum(count - 1, 1)
