"""V-Triune's reward server as it was published, quirks and all: nothing else may use this.

For runs that must be comparable with the original's. docs/vtriune_compat.md shows each difference
from our own verifiers by an example.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtriune_jax.rewards.arrays import Array
from vtriune_jax.rewards.detection import AVERAGED, WEIGHTS
from vtriune_jax.rewards.matching import Match
from vtriune_jax.rewards.shaping import combine
from vtriune_jax.verifiers import detection, mathverify
from vtriune_jax.verifiers.parsing import LabelledBox, columns
from vtriune_jax.verifiers.wire import nothing, sub_scores
from vtriune_jax.verifiers.worker import guarded

_GRID = 1000
_NO_WEIGHTS: Mapping[str, float] = {}
_PAIRS = 2**20
"""Of boxes that are compared; of a longer answer the first ones. The original has no bound."""
_LARGEST = 1e150
"""Of finite area; 1e999 is legal JSON."""


def judge(request: Mapping[str, Any], iou_threshold: str | float) -> dict[str, float]:
    """The original's rewards; whatever goes wrong leaves those that had been found by then."""
    rewards = nothing()
    guarded(_fill, rewards, request, iou_threshold)
    return rewards


def overrun(request: Mapping[str, Any]) -> dict[str, float]:
    """Its rewards when its own time limits struck: the answer counts as wrong."""
    rewards = nothing()
    guarded(_fill, rewards, request, "dynamic", True)
    return rewards


def _fill(
    rewards: dict[str, float],
    request: Mapping[str, Any],
    iou_threshold: str | float,
    overran: bool = False,
) -> None:
    params = json.loads(request["reward_verifier_parm"])
    given = params.pop("iou_threshold", None)  # the one key that the original lacks
    given = iou_threshold if given is None else given
    settings = _settings(**params)
    response, truth = request["response"], request["solution"]
    others = {}
    if request["reward_verifier"] == "mathverify":
        rewards["format_reward"] = mathverify.format_score(response)
        accuracy = 0.0 if overran else _math_accuracy(response, truth)
    elif request["reward_verifier"] == "detection":
        weights = _weights(settings["ratios"])
        predicted = _boxes(_answer(response))
        rewards["format_reward"] = float(
            "\n<answer>\n" in response and response.count("\n</answer>") == 1 and bool(predicted)
        )
        true = () if overran else _boxes(_answer(truth))
        parts = _detection_parts(predicted, true, settings, weights, _threshold(given))
        others, accuracy = sub_scores(parts), parts["accuracy"]
    else:
        raise ValueError("unknown verifier")
    rewards |= {"accuracy_reward": accuracy, **others}
    ratios = request["accuracy_ratio"], request["format_ratio"]
    rewards["final_reward"] = combine(accuracy, rewards["format_reward"], *ratios)


def _settings(
    *,
    is_training: Any,
    step: float,
    total_steps: float,
    image_path: Any = None,
    image_grid_thw: Sequence[Sequence[int]] | None = None,
    verifier_style: Any = "rule",
    det_verifier_normalized: Any = False,
    det_reward_ratio: Any = _NO_WEIGHTS,
) -> dict[str, Any]:
    """The original's parameters; TypeError for others and for missing ones."""
    return {
        "progress": step / total_steps,
        "grid": image_grid_thw if det_verifier_normalized else None,
        "ratios": det_reward_ratio,
    }


def _math_accuracy(response: str, truth: str) -> float:
    """Of lower-cased texts; a truth that cannot be read makes any answer wrong."""
    parts = guarded(mathverify.verify, response.lower(), truth.lower(), {}, 0.0)
    return 0.0 if isinstance(parts, Exception) else parts["accuracy"]


def _answer(text: str) -> str:
    """The first <answer>…</answer>, lower-cased."""
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>") : end].strip().lower() if 0 <= start < end else ""


def _boxes(text: str) -> list[LabelledBox]:
    """All or nothing, but for objects of the wrong shape."""
    text = text.replace("[[", "[").replace("]]", "]")
    if not text.endswith("]"):
        text = text.rpartition("},")[0] or text
        text += "}]"
    try:
        entries = json.loads(text.replace("'", '"').replace("\\", ""))
    except (ValueError, RecursionError):
        return []
    if not isinstance(entries, list):
        return []
    boxes: dict[tuple[Any, ...], LabelledBox] = {}
    for entry in entries:
        coords = entry.get("bbox_2d") if isinstance(entry, dict) else None
        if not isinstance(coords, list) or len(coords) != 4:
            continue
        label = entry.get("label")
        if not isinstance(label, str) or not all(isinstance(v, int | float) for v in coords):
            continue
        x1, y1, x2, y2 = coords
        if x1 <= x2 and y1 <= y2:
            key = (x1, y1, x2, y2)
            x1, y1, x2, y2 = (max(min(value, _LARGEST), -_LARGEST) for value in coords)
            boxes.setdefault(key, LabelledBox((x1, y1, x2, y2), label))
    return list(boxes.values())


def _threshold(given: Any) -> float | None:
    """A threshold, `AVERAGE` for whatever the original does not know, None for the dynamic one."""
    if given == "dynamic":
        return None
    value = guarded(float, given)
    return value if not isinstance(value, Exception) and value in AVERAGED else detection.AVERAGE


def _weights(ratios: Mapping[str, float]) -> dict[str, float]:
    """What is missing or out of range is 0; a null is a TypeError."""
    given = {name: ratios.get(name, 0.0) for name in (*WEIGHTS, "iou_completeness")}
    return {name: float(value) if 0 <= value <= 1 else 0.0 for name, value in given.items()}


def _detection_parts(
    predicted: Sequence[LabelledBox],
    true: Sequence[LabelledBox],
    settings: Mapping[str, Any],
    weights: Mapping[str, float],
    threshold: float | None,
) -> dict[str, float]:
    if threshold is None:
        threshold = detection.threshold("dynamic", settings["progress"])
    case = detection.Case(
        tagged=False,
        predicted=columns(_floored(predicted, settings["grid"]) if true else ()),
        true=detection.truth(columns(true if predicted else ())),
        threshold=threshold,
        weights=tuple(weights[name] for name in WEIGHTS),
        completeness=weights["iou_completeness"],
    )
    return detection.score([case], iou_first_as_published, _PAIRS // max(1, len(true)))[0]


def _floored(
    boxes: Sequence[LabelledBox], grid: Sequence[Sequence[int]] | None
) -> list[LabelledBox]:
    """Pixels → the truth's grid of integers, cut off rather than rounded."""
    if not grid:
        return list(boxes)
    _, height, width = grid[0]
    sides = (width, height, width, height)
    return [
        box._replace(
            coords=tuple(int(v / s * _GRID) for v, s in zip(box.coords, sides, strict=True))
        )
        for box in boxes
    ]


def iou_first_as_published(iou: Array, same_label: Array, real: Array, thresholds: Array) -> Match:
    """Its indices go astray: the best pair of all unused boxes earns the credit, but the last
    prediction and the last true box are used up, and it is their labels that must be equal.

    Without padding; NumPy only.
    """
    p, g = iou.shape[-2:]
    last = np.arange(1, min(p, g) + 1)
    best = np.maximum.accumulate(np.maximum.accumulate(iou, axis=-2), axis=-1)
    value = best[..., None, p - last, g - last]  # of what is left when k pairs are gone
    equal = same_label[..., None, p - last, g - last]
    hit = value >= thresholds[..., None]
    return Match(np.where(hit & equal, value, 0.0).sum(-1), hit.sum(-1).astype(float))
