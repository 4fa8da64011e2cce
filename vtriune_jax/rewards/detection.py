"""The detection reward: matching at many IoU thresholds at once, completeness, COCO mAP."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float

from vtriune_jax.rewards.arrays import Array, namespace
from vtriune_jax.rewards.boxes import Boxes, pairs_of_labels, pairwise_iou
from vtriune_jax.rewards.coco import coco_map
from vtriune_jax.rewards.matching import Match, completeness, iou_first, label_first
from vtriune_jax.rewards.shaping import size_penalty, weighted_mean

WEIGHTS = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")
"""Terms of the accuracy by their names in the rows, in the order of `weights` below."""
AVERAGED = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
"""IoU thresholds of V-Triune, over which the threshold "average" takes the mean."""
REPORTED = (0.5, 0.75, 0.95, 0.99)
"""IoU thresholds whose scores are reported beside the one that is trained on: `label_first`'s."""
REPORTED_IOU_FIRST = (0.5, 0.95)
"""The same for `iou_first`."""

ANY_OVERLAP = 1e-30


def detection_parts(
    predicted: Boxes,
    true: Boxes,
    threshold: Float[Array, "*batch"],
    weights: Float[Array, "*batch 5"],
    completeness_share: Float[Array, "*batch"],
    average: bool = False,
    match_by_iou: Callable[..., Match] = iou_first,
) -> dict[str, Float[Array, "*batch"]]:
    """All scores of a batch of images, each with its own threshold and weights.

        k           = (1 − c)·ΣIoU_k / G + c·completeness_k      for the matching orders k
        accuracy    = 0.6^|P − G| · Σ w·(label_first, iou_first, map, map50, map75) / Σ w

    With `average`, a threshold of NaN stands for the mean of k over `AVERAGED`. Reported beside
    these are ΣIoU / G at other thresholds, `iou` (any overlap counts) and `iou_50` … `iou_99`, with
    the shares of matched boxes `precision_50` …, `recall_50` …, all of `label_first`; and the same
    of `iou_first`, for example `iou_first_precision_50`. Without predictions all are 0.

    `match_by_iou` stands in for `iou_first`, for the sake of compatibility.
    """
    xp = namespace(predicted.coords)
    dtype = predicted.coords.dtype
    iou = pairwise_iou(predicted.coords, true.coords)
    real, same = pairs_of_labels(predicted, true)
    p, g = (xp.astype(side.mask.sum(axis=-1), dtype) for side in (predicted, true))
    boxes = xp.maximum(g, 1)[..., None]

    fixed = xp.asarray([ANY_OVERLAP, *REPORTED, *(AVERAGED if average else ())], dtype=dtype)
    fixed = xp.broadcast_to(fixed, (*threshold.shape, len(fixed)))
    thresholds = xp.concat([fixed[..., :1], threshold[..., None], fixed[..., 1:]], axis=-1)
    by_label = label_first(iou, same, thresholds)
    matches = {
        "label_first": Match(*(each[..., 1:] for each in by_label)),
        "iou_first": match_by_iou(iou, same, real, thresholds[..., 1:]),
    }
    parts, terms = {}, []
    for name, (credit, count) in matches.items():
        share = completeness_share[..., None]
        matched = (1 - share) * credit / boxes + share * completeness(count, p, g)
        score = matched[..., 0]
        if average:
            score = xp.where(xp.isnan(threshold), matched[..., -len(AVERAGED) :].mean(-1), score)
        terms.append(score)
        parts[name] = score
        prefix = "" if name == "label_first" else "iou_first_"
        for at in REPORTED if name == "label_first" else REPORTED_IOU_FIRST:
            k = 1 + REPORTED.index(at)
            parts[f"{prefix}iou_{100 * at:.0f}"] = credit[..., k] / boxes[..., 0]
            parts[f"{prefix}precision_{100 * at:.0f}"] = count[..., k] / xp.maximum(p, 1)
            parts[f"{prefix}recall_{100 * at:.0f}"] = count[..., k] / boxes[..., 0]
    maps = coco_map(iou, predicted, true, same)
    terms += [maps[..., k] for k in range(3)]
    penalty = xp.where(p > 0, size_penalty(p, g), 0.0)
    return {
        "accuracy": penalty * weighted_mean(xp.stack(terms, axis=-1), weights),
        "size_penalty": penalty,
        **parts,
        "iou": by_label.credit[..., 0] / boxes[..., 0],
        "map": maps[..., 0],
        "map50": maps[..., 1],
        "map75": maps[..., 2],
    }
