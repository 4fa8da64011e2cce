"""The detection reward: greedy matching at several IoU thresholds at once, completeness, COCO mAP.

Every function but the last is written for one image (P predicted boxes, G true ones, both padded);
`detection_parts` maps them over a batch. Nothing depends on the padding, so a batch may be cut into
buckets of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vtriune_jax.rewards.boxes import Boxes, pairwise_iou
from vtriune_jax.rewards.shaping import size_penalty

WEIGHTS = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")
"""Terms of the accuracy by their names in the rows, in the order of `weights` below."""
REPORTED = (0.5, 0.75, 0.95, 0.99)
"""IoU thresholds whose scores are reported beside the one that is trained on."""

_COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_ROUNDED_DOWN = np.arange(101) * 0.01 <= np.arange(101) / 100
_COCO_MAX_DETECTIONS = 100
_COCO_EPSILON = 2.2e-16


class Match(NamedTuple):
    """What a matching at one threshold found."""

    credit: Float[Array, "..."]
    """Sum of the IoUs that count."""
    count: Float[Array, "..."]
    """Number of matched pairs."""


def label_first(
    iou: Float[Array, "p g"], same_label: Bool[Array, "p g"], thresholds: Float[Array, " t"]
) -> Match:
    """Each true box, in its listed order, takes the best unused prediction of its own label.

    The pair counts when its IoU reaches the threshold; a true box that is refused uses nothing up.
    Pairs that must not match (padding) are False in `same_label`. Fields of the result: [t].
    """
    iou = jnp.where(same_label, iou, -1)

    def at(threshold: Array) -> Match:
        def take(free: Array, candidates: Array) -> tuple[Array, tuple[Array, Array]]:
            candidates = jnp.where(free, candidates, -1)
            best = jnp.argmax(candidates)
            value = candidates[best]
            hit = (value >= threshold) & (value >= 0)
            free &= ~(hit & (jnp.arange(len(free)) == best))
            return free, (jnp.where(hit, value, 0), hit)

        _, (credit, hit) = jax.lax.scan(take, jnp.ones(len(iou), bool), iou.T)
        return Match(credit.sum(), hit.sum().astype(iou.dtype))

    return jax.vmap(at)(thresholds)


def iou_first(
    iou: Float[Array, "p g"],
    same_label: Bool[Array, "p g"],
    real: Bool[Array, "p g"],
    thresholds: Float[Array, " t"],
) -> Match:
    """The best unused pair of all is matched, and the next, while its IoU reaches the threshold.

    Labels do not guide the search; a matched pair earns its IoU when they are equal, else nothing.
    The order of the pairs is the same for every threshold, so one pass serves them all.
    """

    def take(free: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        candidates = jnp.where(free, iou, -1)
        row = jnp.argmax(candidates.max(axis=1))
        column = jnp.argmax(candidates[row])
        used = (jnp.arange(len(iou)) == row)[:, None] | (jnp.arange(iou.shape[1]) == column)
        return free & ~used, (candidates[row, column], same_label[row, column])

    _, (value, equal) = jax.lax.scan(take, real, None, length=min(iou.shape))
    hit = (value >= thresholds[:, None]) & (value >= 0)
    return Match(jnp.where(hit & equal, value, 0).sum(axis=-1), hit.sum(axis=-1).astype(iou.dtype))


def completeness(
    matches: Float[Array, "*t"], predicted: Float[Array, ""], true: Float[Array, ""]
) -> Float[Array, "*t"]:
    """1 − (miss rate + false alarm rate) / 2, i.e. the mean of recall and precision."""
    return (matches / jnp.maximum(true, 1) + matches / jnp.maximum(predicted, 1)) / 2


def coco_map(
    iou: Float[Array, "p g"], predicted: Boxes, true: Boxes, same_label: Bool[Array, "p g"]
) -> Float[Array, "3"]:
    """mAP over IoU 0.50:0.05:0.95, mAP50 and mAP75 of one image, as COCO evaluates them.

    Predictions carry no confidence, so they are ranked as listed. Each takes the unused true box
    of its label with the largest IoU that reaches the threshold (the later one on ties). The
    precision, made non-increasing from the right, is averaged over 101 recalls; the classes are
    those of the truth.
    """
    p, g = iou.shape
    thresholds = jnp.minimum(jnp.asarray(_COCO_THRESHOLDS, iou.dtype), 1 - 1e-10)
    peers = predicted.mask & (predicted.labels[:, None] == predicted.labels[None, :])
    until = peers & (jnp.arange(p)[None, :] <= jnp.arange(p)[:, None])  # [p, p]: listed up to here
    rank = until.sum(axis=1)
    iou = jnp.where(same_label & (rank <= _COCO_MAX_DETECTIONS)[:, None], iou, -1)

    def take(free: Array, candidates: Array) -> tuple[Array, Array]:
        candidates = jnp.where(free, candidates, -1)  # [10, g]
        best = g - 1 - jnp.argmax(candidates[:, ::-1], axis=1)
        hit = candidates.max(axis=1) >= thresholds
        return free & ~(hit[:, None] & (jnp.arange(g) == best[:, None])), hit

    _, hit = jax.lax.scan(take, jnp.ones((len(thresholds), g), bool), iou)
    hit = hit.T  # [10, p]
    found = (hit[:, None, :] & until).sum(axis=2)
    precision = found / (rank + _COCO_EPSILON)
    envelope = jnp.where(until.T, precision[:, None, :], 0).max(axis=2)

    # Recall only rises at hits, so each hit weighs as many of the 101 recalls as it is the first to
    # reach; the first hit of a class also has recall 0.
    positives = jnp.maximum(same_label.sum(axis=1), 1)
    before = jnp.where(found > 1, _recalls_reached(found - 1, positives), 0)
    newly = _recalls_reached(found, positives) - before
    area = (hit * newly * envelope).sum(axis=1) / 101  # of all classes together

    earlier = jnp.arange(g)[None, :] < jnp.arange(g)[:, None]
    repeated = (true.mask & earlier & (true.labels[:, None] == true.labels)).any(axis=1)
    average = area / jnp.maximum((true.mask & ~repeated).sum(), 1)
    return jnp.stack([average.mean(), average[0], average[5]])


def _recalls_reached(found: Array, positives: Array) -> Array:
    """How many of COCO's 101 recalls, the float64 numbers k · 0.01, are ≤ found / positives.

    In integers, as XLA may divide by a reciprocal. Only where found / positives is a hundredth does
    rounding decide: COCO's 70th recall is 0.7000000000000001, which 7 / 10 does not reach.
    """
    last = 100 * found // positives
    return last + ((100 * found % positives != 0) | jnp.asarray(_ROUNDED_DOWN)[last])


def detection_parts(
    predicted: Boxes,
    true: Boxes,
    threshold: Float[Array, " batch"],
    weights: Float[Array, "batch 5"],
    completeness_share: Float[Array, " batch"],
) -> dict[str, Float[Array, " batch"]]:
    """All scores of a batch of images, each with its own threshold and weights.

        matched(k)  = (1 − c)·ΣIoU_k / G + c·completeness_k      for the matching orders k
        accuracy    = 0.6^|P − G| · Σ w·(matched(label_first), matched(iou_first), mAP, …) / Σ w

    `iou` and `iou_50` … `iou_99` are ΣIoU / G of `label_first` (any overlap counts; only from that
    IoU on), `precision_50` and `recall_50` its shares of matched boxes at 0.5. An image without
    predictions scores 0.
    """
    return jax.vmap(_parts)(predicted, true, threshold, weights, completeness_share)


def _parts(
    predicted: Boxes, true: Boxes, threshold: Array, weights: Array, share: Array
) -> dict[str, Array]:
    dtype = predicted.coords.dtype
    iou = pairwise_iou(predicted.coords, true.coords)
    real = predicted.mask[:, None] & true.mask[None, :]
    same = real & (predicted.labels[:, None] == true.labels[None, :])
    p, g = (side.mask.sum().astype(dtype) for side in (predicted, true))
    thresholds = jnp.concatenate(
        [threshold[None], jnp.asarray([jnp.finfo(dtype).tiny, *REPORTED], dtype)]
    )

    by_label = label_first(iou, same, thresholds)
    pure = by_label.credit / jnp.maximum(g, 1)
    by_iou = iou_first(iou, same, real, thresholds[:1])
    maps = coco_map(iou, predicted, true, same)

    def matched(credit: Array, count: Array) -> Array:
        return (1 - share) * credit / jnp.maximum(g, 1) + share * completeness(count, p, g)

    terms = jnp.stack(
        [
            matched(by_label.credit[0], by_label.count[0]),
            matched(by_iou.credit[0], by_iou.count[0]),
            *maps,
        ]
    )
    accuracy = size_penalty(p, g) * (weights @ terms) / weights.sum()
    parts = {
        "accuracy": jnp.where(p > 0, accuracy, 0),
        "iou": pure[1],
        "precision_50": by_label.count[2] / jnp.maximum(p, 1),
        "recall_50": by_label.count[2] / jnp.maximum(g, 1),
    }
    parts |= {f"iou_{100 * t:.0f}": pure[2 + k] for k, t in enumerate(REPORTED)}
    return parts | {"map": maps[0], "map50": maps[1], "map75": maps[2]}
