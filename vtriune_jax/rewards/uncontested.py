"""The detection reward where no two boxes want the same one: most images, and then it is simple.

Whatever the order of the turns each box gets the one that it overlaps most, at all thresholds that
this reaches; so of all pairs only the few that overlap need be looked at. NumPy only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vtriune_jax.rewards.coco import MAX_AREA, MAX_DETECTIONS, THRESHOLDS, newly_reached
from vtriune_jax.rewards.detection import (
    ANY_OVERLAP,
    AVERAGED,
    REPORTED,
    REPORTED_IOU_FIRST,
)
from vtriune_jax.rewards.ragged_boxes import Ragged
from vtriune_jax.rewards.shaping import size_penalty, weighted_mean

_LEVELS = np.minimum(THRESHOLDS, 1 - 1e-10)
_ROUNDS = 16
"""Rounds of choosing after which an image is left to others."""


class _Pairs(NamedTuple):
    """Pairs of boxes, predicted (row) and true (column); of one row by rising column and vice
    versa."""

    row: Int[np.ndarray, " pairs"]
    column: Int[np.ndarray, " pairs"]
    iou: Float[np.ndarray, " pairs"]

    def where(self, mask: Bool[np.ndarray, " pairs"]) -> _Pairs:
        places = np.flatnonzero(mask)
        return _Pairs(*(each.take(places) for each in self))

    @property
    def turned(self) -> _Pairs:
        return _Pairs(self.column, self.row, self.iou)


def uncontested_parts(
    predicted: Ragged,
    true: Ragged,
    threshold: Float[np.ndarray, " images"],
    weights: Float[np.ndarray, "images 5"],
    completeness_share: Float[np.ndarray, " images"],
) -> tuple[dict[str, Float[np.ndarray, " images"]], Bool[np.ndarray, " images"]]:
    """What `detection_parts` says of every image, and of which images this may be wrong.

    Every image has a true and a predicted box.
    """
    p, g = predicted.counts.astype(float), true.counts.astype(float)
    of_row, of_column = predicted.images, true.images
    average = bool(np.isnan(threshold).any())
    lowest = np.fmin(threshold, AVERAGED[0])
    pairs, large = _overlapping(predicted, true)
    same = predicted.labels[pairs.row] == true.labels[pairs.column]
    relevant = pairs.iou >= lowest[of_row[pairs.row]]
    doubtful = (lowest < ANY_OVERLAP) | (predicted.counts > MAX_DETECTIONS)
    doubtful[of_row[large]] = True

    alike = pairs.where(same & (pairs.iou >= ANY_OVERLAP))
    by_truth = pairs.where(same & relevant)
    any_overlap, again = _in_turn(alike.turned, of_column, len(of_row), _ROUNDS)
    doubtful[again] = True
    by_label, again = _in_turn(by_truth.turned, of_column, len(of_row))
    doubtful[again] = True
    # of equally good boxes COCO takes the later one
    later = _Pairs(*(each[::-1] for each in by_truth))
    ranked, again = _in_turn(later, of_row, len(of_column))
    doubtful[again] = True
    by_iou, again = _in_turn(pairs.where(relevant), of_row, len(of_column))
    doubtful[again] = True
    earns = predicted.labels == true.labels[np.maximum(by_iou.partner, 0)]

    parts: dict[str, np.ndarray] = {}
    terms = []
    others = AVERAGED if average else ()
    share = completeness_share
    for name, reported, found, owner, side, earned in (
        ("label_first", REPORTED, by_label.value, of_column, true, by_label.value),
        ("iou_first", REPORTED_IOU_FIRST, by_iou.value, of_row, predicted, by_iou.value * earns),
    ):
        fixed = np.array([*reported, *others])[:, None]
        least = np.vstack([threshold[owner], np.broadcast_to(fixed, (len(fixed), len(owner)))])
        hit = found >= least  # [t, boxes]
        starts = side.starts
        credit = np.add.reduceat(hit * earned, starts, axis=1) / g
        count = np.add.reduceat(hit, starts, axis=1, dtype=np.int64)
        precision, recall = count / p, count / g
        matched = (1 - share) * credit + share * ((recall + precision) / 2)
        score = matched[0]
        if average:
            score = np.where(np.isnan(threshold), _mean(matched[-len(AVERAGED) :]), score)
        terms.append(score)
        parts[name] = score
        prefix = "" if name == "label_first" else "iou_first_"
        for k, at in enumerate(reported, 1):
            parts[f"{prefix}iou_{100 * at:.0f}"] = credit[k]
            parts[f"{prefix}precision_{100 * at:.0f}"] = precision[k]
            parts[f"{prefix}recall_{100 * at:.0f}"] = recall[k]
    maps = _coco_map(ranked.value, predicted, true)
    terms += list(maps)
    penalty = np.asarray(size_penalty(p, g))
    starts = true.starts
    accuracy = penalty * weighted_mean(np.stack(terms, axis=-1), weights)
    return {
        "accuracy": accuracy,
        "size_penalty": penalty,
        **parts,
        "iou": np.add.reduceat(any_overlap.value, starts) / g,
        "map": maps[0],
        "map50": maps[1],
        "map75": maps[2],
    }, doubtful


def _overlapping(predicted: Ragged, true: Ragged) -> tuple[_Pairs, Int[np.ndarray, " large"]]:
    """The pairs with an IoU above 0; which predicted boxes are larger than COCO's largest."""
    images = len(predicted.counts)
    starts = [side.starts for side in (predicted, true)]
    (px1, py1, px2, py2), (gx1, gy1, gx2, gy2) = _padded(predicted), _padded(true)
    # of numbers rounded to float32: nothing is missed, and what only touches is dropped below
    near = (px1[:, None] <= gx2) & (gx1 <= px2[:, None])
    near &= (py1[:, None] <= gy2) & (gy1 <= py2[:, None])
    places = np.flatnonzero(near).astype(np.int32)
    both = places // images
    image, row = places - both * images, both // near.shape[1]
    column = both - row * near.shape[1] + starts[1].astype(np.int32)[image]
    row += starts[0].astype(np.int32)[image]

    areas = [
        np.maximum(c[:, 2] - c[:, 0], 0) * np.maximum(c[:, 3] - c[:, 1], 0)
        for c in (predicted.coords, true.coords)
    ]
    a, b = predicted.coords.take(row, 0), true.coords.take(column, 0)
    width, height = (
        np.maximum(np.minimum(a[:, k + 2], b[:, k + 2]) - np.maximum(a[:, k], b[:, k]), 0)
        for k in range(2)
    )
    inter = width * height
    union = areas[0].take(row) + areas[1].take(column) - inter
    with np.errstate(invalid="ignore"):  # 0 / 0, of two points
        pairs = _Pairs(row, column, inter / union)
    return pairs.where(inter > 0), np.flatnonzero(areas[0] > MAX_AREA)


def _padded(side: Ragged) -> Float[np.ndarray, "4 most images"]:
    """Coordinates rounded to float32; the padding overlaps nothing."""
    images, most = len(side.counts), int(side.counts.max())
    out = np.empty((4, most * images), np.float32)
    out[:2], out[2:] = np.inf, -np.inf
    image = side.images
    places = (np.arange(len(image)) - side.starts[image]) * images
    places += image
    for k in range(4):
        out[k, places] = side.coords[:, k]
    return out.reshape(4, most, images)


class _Chosen(NamedTuple):
    """What each row got: an IoU, 0 for nothing, and the column, −1 for none."""

    value: Float[np.ndarray, " rows"]
    partner: Int[np.ndarray, " rows"]


def _in_turn(
    pairs: _Pairs, of_row: Int[np.ndarray, " rows"], columns: int, rounds: int = 1
) -> tuple[_Chosen, Int[np.ndarray, " images"]]:
    """Each row in its turn takes the best column left; the images where that needs more rounds.

    Of equal values the pair listed first is taken. All rows ask for their best column at once, the
    first to ask gets it, the others ask for their next best in another round. Where no column is
    asked for twice the result is the same whatever the order of the turns, and at any threshold.
    """
    rows = len(of_row)
    value, partner = np.zeros(rows), np.full(rows, -1)
    while True:
        rounds -= 1
        best = np.zeros(rows)
        np.maximum.at(best, pairs.row, pairs.iou)
        places = np.flatnonzero(pairs.iou == best.take(pairs.row))[::-1]
        wish = np.full(rows, -1)
        wish[pairs.row.take(places)] = places  # the last to be written is the first listed
        asking = np.flatnonzero(wish >= 0)
        wish = wish.take(asking)
        wanted = pairs.column.take(wish)
        value[asking], partner[asking] = pairs.iou.take(wish), wanted
        winner = np.full(columns, -1)
        winner[wanted[::-1]] = wish[::-1]
        lost = winner.take(wanted) != wish
        again = np.unique(of_row.take(asking[lost]))
        if not len(again) or not rounds:
            return _Chosen(value, partner), again
        unsettled = np.zeros(of_row[-1] + 1, bool)
        unsettled[again] = True
        keep = unsettled.take(of_row.take(pairs.row))
        keep[wish[lost]] = False
        value[unsettled.take(of_row)] = 0
        pairs = pairs.where(keep)


@lru_cache(1)
def _precisions() -> tuple[Int[np.ndarray, "found rank"], Float[np.ndarray, " key"]]:
    """Numbers that compare as the precisions found / rank do, and the precisions by number."""
    count = np.arange(MAX_DETECTIONS + 1)
    values, keys = np.unique(count[:, None] / (count + np.spacing(1)), return_inverse=True)
    return keys.reshape(len(count), -1).astype(np.int32), values


def _coco_map(
    value: Float[np.ndarray, " boxes"], predicted: Ragged, true: Ragged
) -> Float[np.ndarray, "3 images"]:
    """`coco.coco_map`, given the IoU with which each predicted box is matched, 0 for none."""
    images, classes = len(true.counts), int(max(true.labels.max(), predicted.labels.max())) + 1
    true_class = true.images * classes + true.labels
    positives = np.bincount(true_class, minlength=images * classes)
    # class by class, in each as listed
    bits = len(value).bit_length()
    ordered = np.sort(
        (predicted.images * classes + predicted.labels << bits) + np.arange(len(value))
    )
    order, group = ordered & (1 << bits) - 1, ordered >> bits
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(group))
    rank = np.arange(1, len(group) + 1) - np.repeat(starts, sizes)

    hit = value.take(order) >= _LEVELS[:, None]  # [10, boxes]
    found = hit.cumsum(axis=1, dtype=np.int32)
    found -= np.repeat(found[:, starts] - hit[:, starts], sizes, axis=1)
    keys, values = _precisions()
    key = keys.reshape(-1).take(found * np.int32(len(keys)) + rank.astype(np.int32))
    # the largest from there on in the group: later groups are made smaller
    step = np.repeat(np.arange(len(sizes), 0, -1, dtype=np.int32) * np.int32(len(values)), sizes)
    key = np.maximum.accumulate((key + step)[:, ::-1], axis=1)[:, ::-1] - step

    # Recall only rises at hits: each one weighs as many of the 101 recalls as it is first to reach.
    newly = newly_reached(int(true.counts.max()))
    place = positives[group].astype(np.int32) * len(newly) + found
    reached = newly.reshape(-1).take(place, mode="clip")  # beyond: of a doubtful image
    first = predicted.starts
    total = np.add.reduceat(hit * reached * values.take(key), first, axis=1) / 101
    average = total / (positives.reshape(images, classes) > 0).sum(axis=1)
    return np.stack([_mean(average), average[0], average[5]])


def _mean(values: Float[np.ndarray, "n images"]) -> Float[np.ndarray, " images"]:
    """Over the first axis; of an image alone to the last digit what it is in company."""
    return np.ascontiguousarray(values.T).mean(axis=1)
