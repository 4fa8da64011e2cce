"""COCO's average precision of one image, for detections without confidences."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vtriune_jax.rewards.arrays import (
    Array,
    batch_first,
    batch_last,
    masked,
    namespace,
    scan,
    stable_order,
)
from vtriune_jax.rewards.boxes import Boxes, area
from vtriune_jax.rewards.in_turn import in_turn

THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100
MAX_AREA = 1e10

_EPSILON = float(np.spacing(1))
_RECALLS = np.arange(101) * 0.01


def coco_map(
    iou: Float[Array, "*batch p g"],
    predicted: Boxes,
    true: Boxes,
    same_label: Bool[Array, "*batch p g"],
) -> Float[Array, "*batch 3"]:
    """mAP over IoU 0.50:0.05:0.95, mAP50 and mAP75 of each image, as COCO evaluates them.

    Predictions carry no confidence, so they are ranked as listed. Each takes the unused true box
    of its label with the largest IoU that reaches the threshold (the later one on ties). The
    precision, made non-increasing from the right, is averaged over 101 recalls; the classes are
    those of the truth. At most 100 predictions of a class are looked at, and of those that are
    larger than 10¹⁰ only the hits.
    """
    xp = namespace(iou)
    if 0 in iou.shape:
        return xp.zeros((*iou.shape[:-2], 3), dtype=iou.dtype)
    # flipped, so that the first of equally good boxes is the later one
    candidates = xp.flip(masked(batch_last(iou, 2), batch_last(same_label, 2)), axis=1)
    least = xp.asarray(np.minimum(THRESHOLDS, 1 - 1e-10), dtype=iou.dtype)[:, None]
    least = xp.broadcast_to(least, (len(THRESHOLDS), candidates.shape[2]))
    hit = in_turn(candidates, least) >= 0  # [p, 10, batch]

    # class by class, in each as listed; the padding last
    labels = xp.where(predicted.mask, predicted.labels, xp.iinfo(predicted.labels.dtype).max)
    order = stable_order(labels)
    labels = batch_last(xp.take_along_axis(labels, order, axis=-1), 1)
    counted = batch_last(xp.take_along_axis(area(predicted.coords) <= MAX_AREA, order, axis=-1), 1)
    hit = xp.take_along_axis(hit, batch_last(order, 1)[:, None], axis=0)
    first = _first_of_class(labels)
    hit, found, rank = _ranked(hit, first, counted)
    precision = _non_increasing(found / (rank + _EPSILON), first)

    # Recall only rises at hits: each one weighs as many of the 101 recalls as it is first to reach.
    positives = batch_last(xp.take_along_axis(same_label.sum(axis=-1), order, axis=-1), 1)
    newly = xp.asarray(newly_reached(iou.shape[-1]))[positives[:, None], found]
    total = xp.where(hit, newly * precision, 0.0).sum(axis=0) / 101  # of all classes together

    average = total / xp.maximum(_classes(true), 1)  # [10, batch]
    scores = xp.stack([average.mean(axis=0), average[0], average[5]])
    return batch_first(xp.astype(scores, iou.dtype), iou.shape[:-2])


def _first_of_class(labels: Array) -> Array:
    """[p, batch] sorted labels → where a class begins."""
    xp = namespace(labels)
    return xp.concat([xp.ones_like(labels[:1], dtype=bool), labels[1:] != labels[:-1]])


def _ranked(hit: Array, first: Array, counted: Array) -> tuple[Array, Array, Array]:
    """Which are hits, the hits of a class so far, and how many of the class counted so far.

    Those that count are the hits and what counts even if it is none. All [p, 10, batch].
    """
    xp = namespace(hit)

    def take(state: tuple[Array, ...], part: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        hit, first, counted = part
        found, rank, seen = (xp.where(first, 0, each) for each in state)
        hit = hit & (seen < MAX_DETECTIONS)
        found, rank = found + hit, rank + (hit | counted)
        return (found, rank, seen + 1), (hit, found, rank)

    none = xp.zeros(hit.shape[1:], xp.int32)
    return scan(take, (none, none, none[0]), (hit, first, counted))[1]


def _non_increasing(precision: Array, first: Array) -> Array:
    """The largest of each class's precisions from there on."""
    xp = namespace(precision)

    def take(later: Array, part: tuple[Array, Array]) -> tuple[Array, tuple[Array]]:
        precision, first = part
        precision = xp.maximum(precision, later)
        return xp.where(first, 0.0, precision), (precision,)

    start = xp.zeros_like(precision[0])
    return scan(take, start, (precision, first), reverse=True)[1][0]


@lru_cache(64)
def newly_reached(most: int) -> Int[np.ndarray, "positives found"]:
    """How many of COCO's recalls the found-th hit reaches first, of as many as `most` true boxes.

    A table, since rounding decides: COCO's 70th recall is 0.7000000000000001, which 7 / 10 does not
    reach, and XLA may divide by a reciprocal.
    """
    counts = np.arange(most + 1)
    recall = counts / np.maximum(counts, 1)[:, None]
    reached = np.searchsorted(_RECALLS, np.minimum(recall, 1), side="right")
    reached[:, 0] = 0  # the first hit also has recall 0
    return np.diff(reached, axis=1, prepend=0).astype(np.int16)


def _classes(true: Boxes) -> Array:
    """[batch] number of different labels."""
    xp = namespace(true.labels)
    labels, mask = batch_last(true.labels, 1), batch_last(true.mask, 1)
    g = len(labels)
    earlier = xp.tril(xp.ones((g, g), bool), k=-1)[:, :, None]
    repeated = ((labels[:, None] == labels) & mask & earlier).any(axis=1)
    return (mask & ~repeated).sum(axis=0)
