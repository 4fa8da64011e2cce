"""The detection reward for lists of boxes of any length: what a verifier's worker computes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vtriune_jax.rewards.coco import MAX_DETECTIONS
from vtriune_jax.rewards.detection import detection_parts
from vtriune_jax.rewards.ragged_boxes import Ragged
from vtriune_jax.rewards.uncontested import uncontested_parts


def ragged_parts(
    predicted: Ragged,
    true: Ragged,
    threshold: Float[np.ndarray, " images"],
    weights: Float[np.ndarray, "images 5"],
    completeness_share: Float[np.ndarray, " images"],
) -> dict[str, Float[np.ndarray, " images"]]:
    """`detection_parts` of images with at least one true box; a threshold of NaN is the mean.

    An image's numbers do not depend on the others, to the last digit.
    """
    settings = threshold, weights, completeness_share
    everything = np.arange(len(threshold))
    easy = everything[(predicted.counts > 0) & (predicted.counts <= MAX_DETECTIONS)]
    hard = everything[predicted.counts > MAX_DETECTIONS]
    found = []
    if len(easy):
        parts, doubtful = uncontested_parts(
            predicted.take(easy), true.take(easy), *(each[easy] for each in settings)
        )
        found.append((easy[~doubtful], {name: each[~doubtful] for name, each in parts.items()}))
        hard = np.union1d(hard, easy[doubtful])
    if len(hard) or not found:
        # NumPy adds up a single column in another order than several: so there are always several
        several = np.resize(hard, max(len(hard), 2)) if len(hard) else everything[:1].repeat(2)
        parts = detection_parts(
            predicted.take(several).padded(),
            true.take(several).padded(),
            *(each[several] for each in settings),
            average=bool(np.isnan(threshold).any()),
        )
        found.append((hard, {name: each[: len(hard)] for name, each in parts.items()}))
    out = {name: np.zeros(len(everything)) for name in found[0][1]}
    for images, parts in found:
        for name, each in parts.items():
            out[name][images] = each
    return out
