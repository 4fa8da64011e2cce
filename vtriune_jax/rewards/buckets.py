"""Ragged lists of boxes → padded arrays of few shapes, so that each shape is compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from vtriune_jax.rewards.boxes import Boxes


class Bucket(NamedTuple):
    """Samples of similar size."""

    places: list[int]
    """Which they are."""
    boxes: int
    """A power of two: what to pad their boxes to under `jax.jit`."""
    rows: int
    """What to pad their number to under `jax.jit`: the same in all buckets of as many boxes."""


def buckets(sizes: Sequence[int], least: int = 16, pairs: int = 2**16) -> Iterator[Bucket]:
    """Sort samples by the power of two that holds their boxes.

    Up to `least` boxes they share one bucket; small shapes are not worth a compilation each. A
    bucket has as many rows as bring it to about `pairs` pairs of boxes, which fit into the cache.
    """
    by_size: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        by_size.setdefault(max(least, 1 << max(size - 1, 0).bit_length()), []).append(place)
    for boxes, places in sorted(by_size.items()):
        rows = max(1, pairs // boxes**2)
        for start in range(0, len(places), rows):
            yield Bucket(places[start : start + rows], boxes, rows)


def pad(
    coords: Sequence[Sequence[Sequence[float | int]]],
    labels: Sequence[Sequence[int]],
    boxes: int | None = None,
    rows: int | None = None,
) -> Boxes:
    """Boxes of each sample → float64 coordinates [rows, boxes, 4], labels and mask [rows, boxes].

    As many boxes as the largest sample has and as many rows as there are samples, unless more are
    asked for; fewer are a ValueError.
    """
    counts = np.array([len(each) for each in coords], int)
    largest = int(counts.max(initial=0))
    rows, boxes = len(counts) if rows is None else rows, largest if boxes is None else boxes
    if len(counts) > rows or largest > boxes:
        raise ValueError(
            f"pad: {len(counts)} samples of up to {largest} boxes do not fit into [{rows}, {boxes}]"
        )
    mask = np.zeros((rows, boxes), bool)
    mask[: len(counts)] = np.arange(boxes) < counts[:, None]
    padded = Boxes(np.zeros((rows, boxes, 4)), np.zeros((rows, boxes), np.int32), mask)
    if mask.any():
        numbers = chain.from_iterable(chain.from_iterable(coords))
        padded.coords[mask] = np.fromiter(numbers, float).reshape(-1, 4)
        padded.labels[mask] = np.fromiter(chain.from_iterable(labels), np.int32)
    return padded
