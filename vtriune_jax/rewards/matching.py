"""Who is matched with whom: predicted boxes (rows) and true ones (columns) of an IoU matrix.

All functions take batches in the leading axes; nothing depends on the padding, which `same_label`
and `real` exclude.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float

from vtriune_jax.rewards.arrays import (
    Array,
    batch_first,
    batch_last,
    comparable,
    largest,
    namespace,
    scan,
    while_loop,
)


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
    by_truth = xp.permute_dims(batch_last(xp.where(same_label, iou, -1.0), 2), (1, 0, 2))
    least = xp.maximum(batch_last(thresholds, 1), 0)
    by_truth, least, value = comparable(by_truth, least)
    n = by_truth.shape[1]

    def take(free: Array, part: tuple[Array]) -> tuple[Array, tuple[Array, Array]]:
        best, place = largest(part[0][:, None, :], free)  # [t, batch]
        hit = best >= least
        return free & ~(place & hit), (best, hit)

    free = xp.ones((n, *least.shape), bool)
    _, (best, hit) = scan(take, free, (by_truth,))
    found = xp.where(hit, value(best), 0.0).sum(axis=0), xp.astype(hit.sum(axis=0), iou.dtype)
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
    # below every threshold (a threshold of NaN is none) a pair neither counts nor stands in the way
    lowest = xp.where(xp.isnan(least), xp.inf, least).min(axis=0)
    candidates = batch_last(xp.where(real, iou, -1.0), 2)
    candidates, _, _ = comparable(xp.where(candidates >= lowest, candidates, -1.0), lowest)

    def unfinished(state: tuple[Array, Array]) -> Array:
        return (state[0] >= 0).any()

    def take(state: tuple[Array, Array]) -> tuple[Array, Array]:
        # What is best in its row and in its column is so when its turn comes: all at once.
        candidates, chosen = state
        usable = candidates >= 0
        _, row = largest(candidates, usable)
        _, column = largest(*(xp.permute_dims(each, (1, 0, 2)) for each in (candidates, usable)))
        best = row & xp.permute_dims(column, (1, 0, 2)) & usable
        used = best.any(axis=1)[:, None] | best.any(axis=0)
        return xp.where(used, -1, candidates), chosen | best

    _, chosen = while_loop(unfinished, take, (candidates, xp.zeros(candidates.shape, bool)))
    pairs = xp.where(chosen, batch_last(iou, 2), -1.0)
    value = pairs.max(axis=1)  # [p, batch]
    earned = xp.where(batch_last(same_label, 2), pairs, 0.0).max(axis=1)
    hit = value[:, None] >= least  # [p, t, batch]
    credit = xp.where(hit, earned[:, None], 0.0).sum(axis=0)
    found = credit, xp.astype(hit.sum(axis=0), iou.dtype)
    return Match(*(batch_first(each, iou.shape[:-2]) for each in found))


def completeness(
    matches: Float[Array, "*batch t"],
    predicted: Float[Array, "*batch"],
    true: Float[Array, "*batch"],
) -> Float[Array, "*batch t"]:
    """1 − (miss rate + false alarm rate) / 2, i.e. the mean of recall and precision."""
    xp = namespace(matches)
    return sum(matches / xp.maximum(side, 1)[..., None] for side in (true, predicted)) / 2
