"""Lists of boxes of any length, one image after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vtriune_jax.rewards.boxes import Boxes


class Ragged(NamedTuple):
    """The boxes of one side of several images."""

    coords: Float[np.ndarray, "boxes 4"]
    labels: Int[np.ndarray, " boxes"]
    """Small numbers ≥ 0 that mean the same word on both sides of an image."""
    counts: Int[np.ndarray, " images"]

    @property
    def images(self) -> Int[np.ndarray, " boxes"]:
        """Which image each box belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def starts(self) -> Int[np.ndarray, " images"]:
        """The place of each image's first box."""
        return np.cumsum(self.counts) - self.counts

    def take(self, images: Int[np.ndarray, " some"]) -> Ragged:
        """Of some images only, in that order."""
        counts = self.counts[images]
        if len(images) == len(self.counts) and (np.diff(images) > 0).all():
            return self
        shift = self.starts[images] - (np.cumsum(counts) - counts)
        places = np.arange(counts.sum()) + np.repeat(shift, counts)
        return Ragged(self.coords[places], self.labels[places], counts)

    def padded(self) -> Boxes:
        """As arrays of one length, at least 1."""
        boxes = max(1, int(self.counts.max(initial=0)))
        mask = np.arange(boxes) < self.counts[:, None]
        coords, labels = np.zeros((*mask.shape, 4)), np.zeros(mask.shape, np.int32)
        coords[mask], labels[mask] = self.coords, self.labels
        return Boxes(coords, labels, mask)
