"""The one thing that a phrase means, as a box or a point.

    accuracy   box: IoU with the true box if it reaches the threshold, else 0 (V-Triune, eq. 5)
               point (`point` = true): 1 when it lies in the true box, its border included, else 0
    format     1 when the answer is one box (or, as asked, one point), else 0

`iou_threshold` and `det_verifier_normalized` are those of `detection`; of boxes `iou` and `iou_50`,
the IoU if it is ≥ 0.5, are reported, too. A box is one object as in `detection`, in a list or bare,
with or without a label, or four bare numbers; a point is two, or [{"point_2d": [x, y]}]. An answer
of several boxes has found nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vtriune_jax.rewards.boxes import contains, pairwise_iou
from vtriune_jax.rewards.detection import AVERAGED
from vtriune_jax.verifiers.answers import LONGEST, judging_itself
from vtriune_jax.verifiers.detection import scale_to_grid, threshold
from vtriune_jax.verifiers.parsing import (
    LabelledBox,
    last_answer,
    parse_boxes,
    parse_list,
    unfenced,
)

_NUMBER = re.compile(r"[-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]{1,3})?")
_BARE = re.compile(r"[\s\[\](),.0-9eE+-]*")


PARAMETERS = ("det_verifier_normalized", "iou_threshold", "point")


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError for a truth that is not one box."""
    truth = _read(last_answer(ground_truth) or ground_truth, "bbox_2d")
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth[:80]!r} is not one box")
    wanted = "point_2d" if params.get("point") else "bbox_2d"
    found = _read(last_answer(completion) or "", wanted)
    if found is not None and params.get("det_verifier_normalized"):
        x, y = scale_to_grid(params.get("grid"))
        x1, y1, x2, y2 = found.coords
        found = found._replace(coords=(x1 * x, y1 * y, x2 * x, y2 * y))
    form = float(found is not None)
    if found is None:
        iou, inside = 0.0, 0.0
    else:
        answer, box = np.array([found.coords]), np.array([truth.coords])
        iou = float(pairwise_iou(answer, box)[0, 0])
        inside = float(contains(box, answer[:, :2])[0, 0])
    if wanted == "point_2d":
        return {"accuracy": inside, "format": form}
    least = threshold(params.get("iou_threshold"), progress)
    limits = AVERAGED if math.isnan(least) else (least,)
    accuracy = sum(iou for limit in limits if iou >= limit) / len(limits)
    return {
        "accuracy": accuracy,
        "format": form,
        "iou": iou,
        "iou_50": iou if iou >= 0.5 else 0.0,
    }


check = judging_itself(verify)


def _read(text: str, wanted: str) -> LabelledBox | None:
    """The only box, or the only point as a box without extent; None where there is not one."""
    count = 2 if wanted == "point_2d" else 4
    if len(text) <= LONGEST and _BARE.fullmatch(text):
        values = [float(value) for value in _NUMBER.findall(text)]
        entries = [{wanted: values}] if len(values) == count else []
    else:
        entries = parse_list(text) or parse_list(f"[{unfenced(text.strip())}]")
    entries = [entry for entry in entries if isinstance(entry, dict) and wanted in entry]
    if len(entries) != 1:
        return None
    coords = entries[0][wanted]
    if isinstance(coords, list) and len(coords) == count:
        boxes = parse_boxes(repr([{"bbox_2d": coords * (4 // count), "label": ""}]))
        return boxes[0] if boxes else None
    return None
