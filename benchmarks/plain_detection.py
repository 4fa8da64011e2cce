"""The published detection reward (V-Triune) as one would write it down: one sample, loops.

What `rewards.py` measures ours against. All sub-scores are there: both matching orders at eleven
thresholds, and COCO's mAP. Where the original has defects (see docs/vtriune_compat.md) this is what
was meant, so that its numbers are those of our verifier.
"""

from __future__ import annotations

import json
import re

import numpy as np

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
WEIGHTS = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}


def score(response: str, solution: str, progress: float, ratios=(1.0, 0.1), weights=WEIGHTS):
    """All parts of the reward of one response."""
    predicted, true = read(response), read(solution)
    tags = response.count("\n<answer>\n") >= 1 and response.count("\n</answer>") == 1
    form = float(tags and bool(predicted))
    epsilon = 0.85 if progress <= 0.1 else 0.95 if progress <= 0.25 else 0.99
    parts = {"format": form, **scores(predicted, true, epsilon, weights)}
    parts["final"] = (parts["accuracy"] * ratios[0] + form * ratios[1]) / sum(ratios)
    return parts


def scores(predicted, true, epsilon: float, weights=WEIGHTS):
    """All that is said of a pair of lists of boxes."""
    share = weights.get("iou_completeness", 0.0)
    parts = {"size_penalty": 0.6 ** abs(len(predicted) - len(true))}
    for order, match in {"label_first": label_first, "iou_first": iou_first}.items():
        found = {at: quality(match(predicted, true, at), predicted, true) for at in THRESHOLDS}
        prefix = "" if order == "label_first" else "iou_first_"
        for at in (0.5, 0.75, 0.95, 0.99) if order == "label_first" else (0.5, 0.95):
            iou, precision, recall, _ = found[at]
            parts[f"{prefix}iou_{100 * at:.0f}"] = iou
            parts[f"{prefix}precision_{100 * at:.0f}"] = precision
            parts[f"{prefix}recall_{100 * at:.0f}"] = recall
        combined = {at: (1 - share) * s[0] + share * s[3] for at, s in found.items()}
        parts[order] = combined[epsilon]
        parts[f"{order}_average"] = sum(combined.values()) / len(combined)
    parts["map"], parts["map50"], parts["map75"] = mean_average_precision(predicted, true)
    names = {"iou_max_label_first": "label_first", "iou_max_iou_first": "iou_first"}
    terms = [*names.items(), ("map", "map"), ("map50", "map50"), ("map75", "map75")]
    total = sum(weights.get(weight, 0.0) for weight, _ in terms)
    mixed = sum(weights.get(weight, 0.0) * parts[name] for weight, name in terms) / total
    parts["accuracy"] = parts["size_penalty"] * mixed
    return parts


def read(text: str) -> list[dict]:
    """The valid boxes between the tags, each once."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if found is None:
        return []
    try:
        entries = json.loads(found[1].strip().replace("'", '"'))
    except json.JSONDecodeError:
        return []
    boxes, seen = [], set()
    for entry in entries:
        box, label = entry.get("bbox_2d"), entry.get("label")
        if not isinstance(box, list) or len(box) != 4 or not isinstance(label, str):
            continue
        if box[0] > box[2] or box[1] > box[3] or tuple(box) in seen:
            continue
        seen.add(tuple(box))
        boxes.append({"bbox_2d": [float(value) for value in box], "label": label.lower()})
    return boxes


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def label_first(predicted, true, least):
    """(credit, matches): every true box in turn takes the best free prediction of its label."""
    free, credit, count = list(range(len(predicted))), 0.0, 0
    for truth in true:
        best, best_iou = None, -1.0
        for k in free:
            if predicted[k]["label"] == truth["label"]:
                value = iou(predicted[k]["bbox_2d"], truth["bbox_2d"])
                if value > best_iou:
                    best, best_iou = k, value
        if best is not None and best_iou >= least:
            free.remove(best)
            credit, count = credit + best_iou, count + 1
    return credit, count


def iou_first(predicted, true, least):
    """(credit, matches): the best pair of all that are free, again and again."""
    free, open_, credit, count = list(range(len(predicted))), list(range(len(true))), 0.0, 0
    while free and open_:
        best, best_iou = (free[0], open_[0]), -1.0
        for k in free:
            for g in open_:
                value = iou(predicted[k]["bbox_2d"], true[g]["bbox_2d"])
                if value > best_iou:
                    best, best_iou = (k, g), value
        if best_iou < least:
            break
        k, g = best
        credit += best_iou if predicted[k]["label"] == true[g]["label"] else 0.0
        count += 1
        free.remove(k)
        open_.remove(g)
    return credit, count


def quality(match, predicted, true):
    """IoU per true box, precision, recall, completeness."""
    credit, count = match
    precision = count / len(predicted) if predicted else 0.0
    recall = count / len(true)
    return credit / len(true), precision, recall, (precision + recall) / 2


def mean_average_precision(predicted, true):
    """COCOeval on one image, predictions of equal confidence in the order of the answer."""
    levels = np.linspace(0.5, 0.95, 10)
    recalls = np.linspace(0.0, 1.0, 101)
    labels = sorted({box["label"] for box in true})
    precision = np.zeros((len(levels), len(recalls), len(labels)))
    for c, label in enumerate(labels):
        dets = [box["bbox_2d"] for box in predicted if box["label"] == label][:100]
        gts = [box["bbox_2d"] for box in true if box["label"] == label]
        ious = np.array([[iou(det, gt) for gt in gts] for det in dets]).reshape(-1, len(gts))
        for t, level in enumerate(levels):
            taken, hits = [False] * len(gts), np.zeros(len(dets))
            for d in range(len(dets)):
                best, match = min(level, 1 - 1e-10), -1
                for g in range(len(gts)):
                    if not taken[g] and ious[d, g] >= best:
                        best, match = ious[d, g], g
                if match >= 0:
                    taken[match], hits[d] = True, 1
            tp, fp = np.cumsum(hits), np.cumsum(1 - hits)
            recall = tp / len(gts)
            values = (tp / (fp + tp + np.spacing(1))).tolist()
            for i in range(len(values) - 1, 0, -1):
                values[i - 1] = max(values[i], values[i - 1])
            for r, place in enumerate(np.searchsorted(recall, recalls, side="left")):
                if place < len(values):
                    precision[t, r, c] = values[place]
    return float(precision.mean()), float(precision[0].mean()), float(precision[5].mean())
