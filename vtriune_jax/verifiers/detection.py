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
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np

from vtriune_jax.rewards.buckets import buckets
from vtriune_jax.rewards.detection import WEIGHTS, detection_parts
from vtriune_jax.rewards.matching import Match
from vtriune_jax.rewards.ragged import ragged_parts
from vtriune_jax.rewards.ragged_boxes import Ragged
from vtriune_jax.rewards.shaping import SIZE_PENALTY
from vtriune_jax.rewards.thresholds import stepped_threshold
from vtriune_jax.verifiers.parsing import (
    LARGEST,
    Columns,
    columns,
    last_answer,
    parse_boxes,
    parse_columns,
)
from vtriune_jax.verifiers.worker import guarded

AVERAGE = float("nan")
"""The threshold "average", for `detection_parts`."""

_PUBLISHED = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}
_GRID = 1000.0
_MIX = np.array([0.7548776662, 1.3247179572, 0.5698402909, 1.2207440846])
_MOST = 256
"""Boxes that are matched; further ones only count."""

Task = tuple[str, str, Mapping[str, Any], float]
"""The arguments of `verify`."""


class Truth(NamedTuple):
    """The true boxes of a row."""

    boxes: Columns
    known: Mapping[str, int]
    """The words of its labels, numbered."""
    labels: list[int]


class Case(NamedTuple):
    """One completion as numbers."""

    tagged: bool
    """Whether the answer's tags are as they should be."""
    predicted: Columns
    true: Truth
    threshold: float
    weights: tuple[float, ...]
    completeness: float
    scale: tuple[float, float] = (1.0, 1.0)
    """Of the predictions' x and y."""


PARAMETERS = ("det_reward_ratio", "det_verifier_normalized", "iou_threshold")


def check(ground_truth: str, params: Mapping[str, Any]) -> None:
    """What `verify` would raise for every completion."""
    _prepare("", ground_truth, params, 1.0)


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
    for k in irregular([out[k].predicted for k in fine]):
        boxes = parse_boxes(last_answer(tasks[fine[k]][0]) or "")
        out[fine[k]] = out[fine[k]]._replace(predicted=columns(boxes))
    for bucket in buckets([_size(out[k]) for k in fine], least=32, pairs=2**19):
        places = [fine[k] for k in bucket.places]
        for k, parts in zip(places, score([out[k] for k in places]), strict=True):
            out[k] = parts
    return out


def irregular(answers: Sequence[Columns]) -> list[int]:
    """Which of the answers may hold a box out of order or too far away, or one twice."""
    coords = _coords(answers)
    x1, y1, x2, y2 = coords.T
    wrong = ~((x1 >= -LARGEST) & (x1 <= x2) & (x2 <= LARGEST))  # NaN is wrong
    wrong |= ~((y1 >= -LARGEST) & (y1 <= y2) & (y2 <= LARGEST))
    answer = np.repeat(np.arange(len(answers)), [len(each.labels) for each in answers])
    with np.errstate(invalid="ignore"):
        mixed = coords @ _MIX + answer * 1e5  # equal for equal boxes, and hardly ever for others
    order = np.argsort(mixed)
    wrong[order[1:]] |= mixed[order[1:]] == mixed[order[:-1]]
    return np.unique(answer[wrong]).tolist()


def _coords(answers: Sequence[Columns]) -> np.ndarray:
    return np.frombuffer(b"".join([each.coords for each in answers])).reshape(-1, 4)


def _size(case: Case) -> int:
    return min(max(len(case.predicted.labels), len(case.true.labels)), _MOST)


def _prepare(completion: str, text: str, params: Mapping[str, Any], progress: float) -> Case:
    """Text → numbers."""
    true = _truth(text)
    predicted = parse_columns(last_answer(completion) or "")
    tags = completion.count("\n<answer>\n") == 1 and completion.count("\n</answer>") == 1
    weights, completeness = _weights(tuple((params.get("det_reward_ratio") or {}).items()))
    normalized = params.get("det_verifier_normalized")
    return Case(
        tagged=tags,
        predicted=predicted,
        true=true,
        threshold=threshold(params.get("iou_threshold"), progress),
        weights=weights,
        completeness=completeness,
        scale=scale_to_grid(params.get("grid")) if normalized else (1.0, 1.0),
    )


@lru_cache(1024)  # the completions of a prompt share their truth
def _truth(text: str) -> Truth:
    boxes = columns(parse_boxes(last_answer(text) or text))
    if not boxes.labels:
        raise ValueError(
            f"the ground truth holds no box: {text[:80]!r}; expected "
            "<answer>[{'bbox_2d': [x1, y1, x2, y2], 'label': '…'}]</answer>"
        )
    if len(boxes.labels) > _MOST:
        raise ValueError(f"the ground truth has {len(boxes.labels)} boxes, more than {_MOST}")
    return truth(boxes)


def truth(boxes: Columns) -> Truth:
    """The boxes with their labels numbered."""
    known: dict[str, int] = {}
    labels = [known.setdefault(label, len(known)) for label in boxes.labels]
    return Truth(boxes, known, labels)


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


def scale_to_grid(grid: Sequence[Sequence[int]] | None) -> tuple[float, float]:
    """Pixels of the processed image → the 0…1000 grid of the truth."""
    if not grid or min(grid[0]) <= 0:
        raise ValueError("det_verifier_normalized needs the size of the processed image")
    height, width = grid[0]
    return _GRID / width, _GRID / height


def score(
    cases: Sequence[Case], match_by_iou: Callable[..., Match] | None = None, most: int = _MOST
) -> list[dict[str, float]]:
    """All scores of cases of similar size; `match_by_iou` stands in for `iou_first`, and `most`
    boxes of an answer are matched."""
    predicted, true = _sides(cases, most)
    thresholds = np.array([case.threshold for case in cases])
    weights = np.array([case.weights for case in cases])
    completeness = np.array([case.completeness for case in cases])
    if match_by_iou is None:
        parts = ragged_parts(predicted, true, thresholds, weights, completeness)
    else:
        average = bool(np.isnan(thresholds).any())
        parts = detection_parts(
            *(predicted.padded(), true.padded(), thresholds, weights, completeness),
            average=average,
            match_by_iou=match_by_iou,
        )
    counts = np.array([len(case.predicted.labels) for case in cases])
    unmatched = SIZE_PENALTY ** np.maximum(counts - most, 0)
    parts["accuracy"] *= unmatched
    parts["size_penalty"] *= unmatched
    parts["format"] = np.array([float(case.tagged) for case in cases]) * (counts > 0)
    parts["boxes"] = counts.astype(float)
    rows = zip(*(values.tolist() for values in parts.values()), strict=True)
    return [dict(zip(parts, row, strict=True)) for row in rows]


def _sides(cases: Sequence[Case], most: int) -> tuple[Ragged, Ragged]:
    """The predicted and the true boxes of all cases."""
    predicted = [case.predicted for case in cases]
    labels = [
        map(case.true.known.get, case.predicted.labels[:most], repeat(len(case.true.known)))
        for case in cases
    ]
    true = [case.true for case in cases]
    counts = np.array([min(len(each.labels), most) for each in predicted])
    coords = _coords([Columns(each.coords[: 32 * most], []) for each in predicted])
    scale = np.array([case.scale for case in cases])
    if (scale != 1).any():
        coords = coords * np.repeat(np.tile(scale, 2), counts, axis=0)
    return (
        Ragged(coords, np.fromiter(chain.from_iterable(labels), int), counts),
        Ragged(
            _coords([each.boxes for each in true]),
            np.fromiter(chain.from_iterable(each.labels for each in true), int),
            np.array([len(each.labels) for each in true]),
        ),
    )
