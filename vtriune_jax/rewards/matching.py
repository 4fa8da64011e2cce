"""Who is matched with whom: predicted boxes (rows) and true ones (columns) of an IoU matrix.

All functions take batches in the leading axes; nothing depends on the padding, which `same_label`
and `real` exclude.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vtriune_jax.rewards.arrays import (
    Array,
    batch_first,
    batch_last,
    first,
    masked,
    namespace,
)
from vtriune_jax.rewards.in_turn import in_turn, lowest


class Match(NamedTuple):
    """What a matching found at each threshold."""

    credit: Float[Array, "*batch t"]
    """Sum of the IoUs that count."""
    count: Float[Array, "*batch t"]
    """Number of matched pairs."""


def label_first(
    iou: Float[Array, "*batch p g"],
    same_label: Bool[Array, "*batch p g"],
    thresholds: Float[Array, "*batch t"],
) -> Match:
    """Each true box, in its listed order, takes the best unused prediction of its own label.

    The pair counts when its IoU reaches the threshold; a true box that is refused uses nothing up.
    Of equally good predictions the first is taken. Pairs that must not match are False in
    `same_label`.
    """
    xp = namespace(iou)
    by_truth = xp.permute_dims(masked(batch_last(iou, 2), batch_last(same_label, 2)), (1, 0, 2))
    got = in_turn(by_truth, batch_last(thresholds, 1))
    found = xp.maximum(got, 0).sum(axis=0), xp.astype((got >= 0).sum(axis=0), iou.dtype)
    return Match(*(batch_first(each, iou.shape[:-2]) for each in found))


def iou_first(
    iou: Float[Array, "*batch p g"],
    same_label: Bool[Array, "*batch p g"],
    real: Bool[Array, "*batch p g"],
    thresholds: Float[Array, "*batch t"],
) -> Match:
    """The best unused pair of all is matched, and the next, while its IoU reaches the threshold.

    Labels do not guide the search; a matched pair earns its IoU when they are equal, else nothing.
    Of equally good pairs the first prediction's is taken, and of these the first true box's.
    """
    xp = namespace(iou)
    least = xp.maximum(batch_last(thresholds, 1), 0)
    values, same = batch_last(iou, 2), batch_last(same_label, 2)
    # below every threshold a pair neither counts nor stands in the way
    values = masked(values, batch_last(real, 2) & (values >= lowest(least)))
    matched, equal = (_one_by_one if isinstance(values, np.ndarray) else _in_rounds)(values, same)
    hit = matched[:, None] >= least  # [p, t, batch]
    credit = (hit * (matched * equal)[:, None]).sum(axis=0)
    found = credit, xp.astype(hit.sum(axis=0), iou.dtype)
    return Match(*(batch_first(each, iou.shape[:-2]) for each in found))


def _one_by_one(values: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[p, g, batch] → the IoU at which each prediction is matched, or −1, and whether its label is
    right. For NumPy: all pairs from the best one on, whatever their image."""
    shape = len(values), values.shape[2]
    matched, equal = np.full(shape, -1, values.dtype), np.zeros(shape, bool)
    row, column, image = np.nonzero(values >= 0)
    order = np.argsort(-values[row, column, image], kind="stable")
    row, column, image = row[order], column[order], image[order]
    count = shape[1]
    rows, columns = (bytearray(side * count) for side in values.shape[:2])
    best = []
    wishes = zip((row * count + image).tolist(), (column * count + image).tolist(), strict=True)
    for k, (p, g) in enumerate(wishes):
        if not (rows[p] or columns[g]):
            rows[p] = columns[g] = True
            best.append(k)
    row, column, image = row[best], column[best], image[best]
    matched[row, image] = values[row, column, image]
    equal[row, image] = same[row, column, image]
    return matched, equal


def _in_rounds(values: Array, same: Array) -> tuple[Array, Array]:
    """The same for JAX: what is best in its row and in its column is so when its turn comes, so all
    such pairs are matched at once."""
    from jax import lax  # not above: workers have no JAX
    from jax import numpy as jnp

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[0] >= 0).any()

    def take(state: tuple[Array, ...]) -> tuple[Array, ...]:
        of_row, values, matched, equal = state
        of_row, of_column = (
            jnp.where(each >= 0, each, 2) for each in (of_row, values.max(axis=0, initial=-1))
        )
        best = first(values == of_row[:, None], 1)[0] & first(values == of_column, 0)[0]
        rows = best.any(axis=1)
        values = masked(values, ~(rows[:, None] | best.any(axis=0)))
        matched = jnp.where(rows, of_row, matched)
        return values.max(axis=1, initial=-1), values, matched, equal | (best & same).any(axis=1)

    of_row = values.max(axis=1, initial=-1)
    start = of_row, values, jnp.full_like(of_row, -1), jnp.zeros(of_row.shape, bool)
    _, _, matched, equal = lax.while_loop(unfinished, take, start)
    return matched, equal


def completeness(
    matches: Float[Array, "*batch t"],
    predicted: Float[Array, "*batch"],
    true: Float[Array, "*batch"],
) -> Float[Array, "*batch t"]:
    """1 − (miss rate + false alarm rate) / 2, i.e. the mean of recall and precision."""
    xp = namespace(matches)
    return sum(matches / xp.maximum(side, 1)[..., None] for side in (true, predicted)) / 2
