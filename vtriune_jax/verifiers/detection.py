"""Boxes in `<answer>` tags judged by matching them with the true ones, a batch at once.

    accuracy   0.6^|P − G| · Σ w·((1 − c)·IoU + c·completeness, mAP, …) / Σ w  (`rewards`)
    format     1 when the answer holds a box and its tags, once each, begin lines, else 0

Beside these: `boxes` (how many were predicted) and all scores of `rewards.detection_parts`.

The parameters of a row, with V-Triune's names: `det_reward_ratio` holds w and c (unless given, the
published 1 for `label_first` and c = 0.3); `det_verifier_normalized` says that the truth is on a
grid of 0…1000 and predictions are pixels of the processed image. Ours: `iou_threshold`, which is

    "dynamic"    0.85 → 0.95 → 0.99 with the training's progress, the default
    "average"    the mean over eleven thresholds from 0.5 to 0.99
    0.5, …       any number of 0…1, or {"bounds": [0.5], "values": [0.8, 0.9]} for own stages

How this differs from the original, and why, is in docs/vtriune_compat.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from vtriune_jax.rewards.buckets import buckets, pad
from vtriune_jax.rewards.detection import WEIGHTS, detection_parts
from vtriune_jax.rewards.matching import Match, iou_first
from vtriune_jax.rewards.shaping import SIZE_PENALTY
from vtriune_jax.rewards.thresholds import stepped_threshold
from vtriune_jax.verifiers.parsing import LabelledBox, last_answer, parse_boxes
from vtriune_jax.verifiers.worker import guarded

AVERAGE = float("nan")
"""The threshold "average", for `detection_parts`."""

_PUBLISHED = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}
_GRID = 1000.0
_MOST = 256
"""Boxes that are matched; further ones only count."""

Task = tuple[str, str, Mapping[str, Any], float]
"""The arguments of `verify`."""


class Case(NamedTuple):
    """One completion as numbers."""

    format: float
    predicted: Sequence[LabelledBox]
    true: Sequence[LabelledBox]
    threshold: float
    weights: tuple[float, ...]
    completeness: float


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """All parts of one completion's reward; ValueError when the row itself is at fault."""
    (parts,) = verify_batch([(completion, ground_truth, params, progress)])
    if isinstance(parts, Exception):
        raise parts
    return parts


def verify_batch(tasks: Sequence[Task]) -> list[dict[str, float] | Exception]:
    """The parts of every completion's reward; an exception where it cannot be judged."""
    out: list[Any] = [guarded(_prepare, *task) for task in tasks]
    fine = [k for k, case in enumerate(out) if isinstance(case, Case)]
    fine.sort(key=lambda k: _size(out[k]))  # padded only to the largest of similar ones
    for bucket in buckets([_size(out[k]) for k in fine], least=32, pairs=2**17):
        places = [fine[k] for k in bucket.places]
        # NumPy adds up a single column in another order than several; so there are always several
        # and the company of an item does not change its last digit
        cases = [out[k] for k in places]
        for k, parts in zip(places, score(cases if len(cases) > 1 else cases * 2), strict=False):
            out[k] = parts
    return out


def _size(case: Case) -> int:
    return min(max(len(case.predicted), len(case.true)), _MOST)


def _prepare(completion: str, truth: str, params: Mapping[str, Any], progress: float) -> Case:
    """Text → numbers."""
    true = _truth(truth)
    predicted = parse_boxes(last_answer(completion) or "")
    if params.get("det_verifier_normalized"):
        predicted = rescaled(predicted, params.get("grid"))
    tags = completion.count("\n<answer>\n") == 1 and completion.count("\n</answer>") == 1
    weights, completeness = _weights(tuple((params.get("det_reward_ratio") or {}).items()))
    return Case(
        format=float(tags and bool(predicted)),
        predicted=predicted,
        true=true,
        threshold=threshold(params.get("iou_threshold"), progress),
        weights=weights,
        completeness=completeness,
    )


@lru_cache(1024)  # the completions of a prompt share their truth
def _truth(text: str) -> tuple[LabelledBox, ...]:
    true = parse_boxes(last_answer(text) or text)
    if not true:
        raise ValueError(
            f"the ground truth holds no box: {text[:80]!r}; expected "
            "<answer>[{'bbox_2d': [x1, y1, x2, y2], 'label': '…'}]</answer>"
        )
    if len(true) > _MOST:
        raise ValueError(f"the ground truth has {len(true)} boxes, more than {_MOST}")
    return tuple(true)


@lru_cache(64)
def _weights(ratios: tuple[tuple[str, float | None], ...]) -> tuple[tuple[float, ...], float]:
    given = {name: float(value) for name, value in ratios if value is not None}
    given = given or _PUBLISHED
    weights = tuple(given.get(name, 0.0) for name in WEIGHTS)
    completeness = given.get("iou_completeness", 0.0)
    if not (sum(weights) > 0 and min(weights) >= 0 and 0 <= completeness <= 1):
        raise ValueError(
            f"det_reward_ratio: {', '.join(WEIGHTS)} = {weights}, iou_completeness="
            f"{completeness}; expected weights ≥ 0 with a sum > 0 and a share of 0…1"
        )
    return weights, completeness


def threshold(given: Any, progress: float) -> float:
    """What `iou_threshold` says at this progress; `AVERAGE` for "average"."""
    if given is None or given == "dynamic":
        return _stepped(progress)
    if given == "average":
        return AVERAGE
    if isinstance(given, Mapping):
        return _stepped(progress, tuple(given["bounds"]), tuple(given["values"]))
    if isinstance(given, int | float | str):
        try:
            value = float(given)
        except ValueError:
            value = -1.0
        if 0 <= value <= 1:
            return value
    raise ValueError(
        f'iou_threshold={given!r}; expected "dynamic", "average", a number of 0…1 or '
        '{"bounds": […], "values": […]}'
    )


@lru_cache(64)
def _stepped(progress: float, *stages: tuple[float, ...]) -> float:
    return float(stepped_threshold(progress, *stages))


def rescaled(
    boxes: Sequence[LabelledBox], grid: Sequence[Sequence[int]] | None
) -> list[LabelledBox]:
    """Pixels of the processed image → the 0…1000 grid of the truth."""
    if not grid or min(grid[0]) <= 0:
        raise ValueError("det_verifier_normalized needs the size of the processed image")
    height, width = grid[0]
    x, y = _GRID / width, _GRID / height
    return [
        LabelledBox((x1 * x, y1 * y, x2 * x, y2 * y), label) for (x1, y1, x2, y2), label in boxes
    ]


def score(
    cases: Sequence[Case], match_by_iou: Callable[..., Match] = iou_first
) -> list[dict[str, float]]:
    """All scores of cases of similar size."""
    sides = [[case.predicted[:_MOST] for case in cases], [case.true for case in cases]]
    words: list[dict[str, int]] = [{} for _ in cases]
    predicted, true = (
        pad(
            [[box.coords for box in boxes] for boxes in side],
            [
                [known.setdefault(box.label, len(known)) for box in boxes]
                for boxes, known in zip(side, words, strict=True)
            ],
            boxes=max(1, *map(len, side)),
        )
        for side in sides
    )
    thresholds = np.array([case.threshold for case in cases])
    parts = detection_parts(
        predicted,
        true,
        thresholds,
        np.array([case.weights for case in cases]),
        np.array([case.completeness for case in cases]),
        average=bool(np.isnan(thresholds).any()),
        match_by_iou=match_by_iou,
    )
    unmatched = np.array([max(len(case.predicted) - _MOST, 0) for case in cases])
    parts["accuracy"] = parts["accuracy"] * SIZE_PENALTY**unmatched
    parts["size_penalty"] = parts["size_penalty"] * SIZE_PENALTY**unmatched
    parts["format"] = np.array([case.format for case in cases])
    parts["boxes"] = np.array([float(len(case.predicted)) for case in cases])
    rows = zip(*(values.tolist() for values in parts.values()), strict=True)
    return [dict(zip(parts, row, strict=True)) for row in rows]
