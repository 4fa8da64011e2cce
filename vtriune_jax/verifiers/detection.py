"""Boxes in `<answer>` tags judged by matching them with the true ones, a batch per jitted call.

    accuracy   0.6^|P − G| · Σ w·((1 − c)·IoU + c·completeness, mAP, …) / Σ w  (`rewards`)
    format     1 when the answer holds a box and its tags are on lines of their own, else 0

The parameters of a row, with V-Triune's names: `det_reward_ratio` holds w and c (unless given, the
published 1 for `label_first` and c = 0.3); `det_verifier_normalized` says that the truth is on a
grid of 0…1000 and predictions are pixels of the processed image. Ours: `iou_threshold`, a number or
"dynamic", the default, which rises 0.85 → 0.95 → 0.99 with the training's progress.

Different from the original on purpose:

* The last answer counts, not the first: reasoning may mention the tag.
* A code fence, an apostrophe in a label and a list that only lacks its last `]` are read.
* Rescaled coordinates are not cut to integers, which kept the IoU of small boxes under 0.99.
* `iou_first` matches the pairs that it credits.
* A truth without boxes, weights that sum to 0 or are negative, and a missing image size are errors
  (the completion is masked), not rewards of 0 or of the format alone.
* Any number is a threshold; the original knows eleven and takes others for the mean over these.
* `true` and `false` are no coordinates. Of more than 512 boxes, only the first 512 are matched.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vtriune_jax.rewards.boxes import Boxes
from vtriune_jax.rewards.detection import WEIGHTS, detection_parts
from vtriune_jax.rewards.shaping import SIZE_PENALTY
from vtriune_jax.rewards.thresholds import stepped_threshold
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.parsing import LabelledBox, last_answer, parse_boxes
from vtriune_jax.verifiers.worker import guarded

_PUBLISHED = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}
_GRID = 1000.0
_BUCKETS = ((8, 32), (32, 32), (128, 8), (512, 1))
"""(boxes, images) of the shapes that are compiled; the last bounds the boxes that are matched."""

_one_compiles = threading.Lock()  # else the first requests, which come together, all would


@dataclass(frozen=True)
class _Case:
    """One completion as numbers."""

    format: float
    predicted: list[LabelledBox]
    true: list[LabelledBox]
    threshold: float
    """NaN: by progress."""
    progress: float
    weights: tuple[float, ...]
    completeness: float


def verify_batch(items: Sequence[Item]) -> list[Mapping[str, float] | Exception]:
    """The parts of every item's reward; an exception for an item that cannot be judged."""
    # float64 on the CPU whatever the caller's defaults are: an IoU of 0.85 must reach 0.85, and the
    # accelerator is busy training
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        out: list[Any] = [guarded(_prepare, item) for item in items]
        buckets: dict[tuple[int, int], list[int]] = {}
        for k, case in enumerate(out):
            if isinstance(case, _Case):
                buckets.setdefault(_bucket(case), []).append(k)
        for (boxes, rows), places in buckets.items():
            for start in range(0, len(places), rows):
                chosen = places[start : start + rows]
                scored = _score_bucket([out[k] for k in chosen], boxes, rows)
                for k, parts in zip(chosen, scored, strict=True):
                    out[k] = parts
    return out


def _prepare(item: Item) -> _Case:
    """Text → numbers; ValueError when the row itself is at fault."""
    params = item.reward.params
    truth = item.reward.ground_truth
    true = parse_boxes(last_answer(truth) or truth)
    if not true:
        raise ValueError(
            f"the ground truth holds no box: {truth[:80]!r}; expected "
            "<answer>[{'bbox_2d': [x1, y1, x2, y2], 'label': '…'}]</answer>"
        )
    if len(true) > _BUCKETS[-1][0]:
        raise ValueError(f"the ground truth has {len(true)} boxes, more than {_BUCKETS[-1][0]}")
    predicted = parse_boxes(last_answer(item.completion) or "")
    if params.get("det_verifier_normalized"):
        predicted = _rescaled(predicted, item)
    text = item.completion
    tags = text.count("\n<answer>\n") >= 1 and text.count("\n</answer>") == 1
    weights, completeness = _weights(params.get("det_reward_ratio"))
    return _Case(
        format=float(tags and bool(predicted)),
        predicted=predicted,
        true=true,
        threshold=_threshold(item),
        progress=item.progress,
        weights=weights,
        completeness=completeness,
    )


def _weights(given: Mapping[str, float | None] | None) -> tuple[tuple[float, ...], float]:
    """The five weights and the share of completeness; nulls are weights that were not given."""
    ratios = {name: value for name, value in (given or {}).items() if value is not None}
    ratios = ratios or _PUBLISHED
    weights = tuple(float(ratios.get(name, 0.0)) for name in WEIGHTS)
    completeness = float(ratios.get("iou_completeness", 0.0))
    if not all(0 <= weight < np.inf for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"det_reward_ratio {ratios} needs weights ≥ 0 with a sum > 0")
    if not 0 <= completeness <= 1:
        raise ValueError(f"det_reward_ratio.iou_completeness={completeness} is not in 0…1")
    return weights, completeness


def _threshold(item: Item) -> float:
    if item.threshold is not None:
        return item.threshold
    given = item.reward.params.get("iou_threshold")
    if given in (None, "dynamic"):
        return math.nan
    if isinstance(given, (int, float)) and 0 < given <= 1:
        return float(given)
    raise ValueError(f'iou_threshold={given!r}; expected "dynamic" or a number in 0…1')


def _rescaled(boxes: Sequence[LabelledBox], item: Item) -> list[LabelledBox]:
    """Pixels of the processed image → the 0…1000 grid of the truth."""
    if not item.grid or min(item.grid[0]) <= 0:
        raise ValueError("det_verifier_normalized needs the size of the processed image")
    height, width = item.grid[0]
    sides = (width, height, width, height)
    return [
        replace(
            box, coords=tuple(v / side * _GRID for v, side in zip(box.coords, sides, strict=True))
        )
        for box in boxes
    ]


def _bucket(case: _Case) -> tuple[int, int]:
    boxes = max(len(case.predicted), len(case.true))
    return next((bucket for bucket in _BUCKETS if boxes <= bucket[0]), _BUCKETS[-1])


def _score_bucket(cases: Sequence[_Case], boxes: int, rows: int) -> list[dict[str, float]]:
    """One jitted call on up to `rows` cases, padded to `rows` images of `boxes` boxes."""
    coords, labels = np.zeros((2, rows, boxes, 4)), np.full((2, rows, boxes), -1)
    threshold, progress, share = np.ones((3, rows))
    weights = np.ones((rows, len(WEIGHTS)))
    for row, case in enumerate(cases):
        words: dict[str, int] = {}
        for side, listed in enumerate((case.predicted[:boxes], case.true)):
            if n := len(listed):
                coords[side, row, :n] = [box.coords for box in listed]
                labels[side, row, :n] = [words.setdefault(box.label, len(words)) for box in listed]
        threshold[row], progress[row] = case.threshold, case.progress
        weights[row], share[row] = case.weights, case.completeness
    with _one_compiles:
        scores = _score(coords, labels, threshold, progress, weights, share)
    columns = {name: np.asarray(values).tolist() for name, values in scores.items()}
    return [
        _parts(case, boxes, {name: column[row] for name, column in columns.items()})
        for row, case in enumerate(cases)
    ]


@jax.jit
def _score(
    coords: Array, labels: Array, threshold: Array, progress: Array, weights: Array, share: Array
) -> dict[str, Array]:
    predicted, true = (Boxes(coords[k], labels[k], labels[k] >= 0) for k in range(2))
    threshold = jnp.where(jnp.isnan(threshold), stepped_threshold(progress), threshold)
    return detection_parts(predicted, true, threshold, weights, share)


def _parts(case: _Case, matched: int, parts: dict[str, float]) -> dict[str, float]:
    unmatched = max(len(case.predicted) - matched, 0)
    accuracy = parts["accuracy"] * SIZE_PENALTY**unmatched
    count = float(len(case.predicted))
    return {**parts, "accuracy": accuracy, "format": case.format, "boxes": count}
