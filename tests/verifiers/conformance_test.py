"""Our own mode against the rewards of V-Triune's server, on the cases that were recorded there.

Where we differ on purpose the case is listed with its reason, so that any other change shows. What
both share by design (matching, mAP, penalties) is compared for all cases, after the original's own
parsing and rounding.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from vtriune_jax.rewards.boxes import Boxes
from vtriune_jax.rewards.detection import WEIGHTS, detection_parts
from vtriune_jax.rewards.thresholds import stepped_threshold
from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers.router import Item

CASES = Path(__file__).parents[3] / "shared" / "conformance" / "vtriune_cases.json"

FLOOR = "the original cuts rescaled coordinates to integers"
IOU_FIRST = "the original's iou_first removes other pairs than it credits"
NUMBER = "the original takes this threshold for the mean over eleven"
DIFFERENT = {
    "det-061": "only the last ] is missing: we mend it",
    "det-065": "a code fence: we read it",
    "det-071": "an escaped apostrophe: the list is well-formed, its label just wrong",
    "det-100": "a truth without boxes: error, not the format's reward",
    "det-155": NUMBER,
    "det-156": NUMBER,
    "det-290": IOU_FIRST,
    "det-292": IOU_FIRST,
    "det-307": IOU_FIRST,
    "det-308": IOU_FIRST,
    "det-318": IOU_FIRST,
    "det-351": "all weights are 0: error",
    "det-352": "no weights: the published ones instead of none",
    "det-356": "a negative weight: error, not 0",
    "det-382": FLOOR,
    "det-396": FLOOR,
    "det-429": "only the last ] is missing: we mend it",
    "det-438": "total_steps = 0 breaks the original; we are told the progress",
    "det-441": FLOOR,
    "det-rand-013": IOU_FIRST,
    "det-rand-021": FLOOR,
    "det-rand-029": FLOOR,
    "det-rand-042": FLOOR,
    "det-rand-057": IOU_FIRST,
    "det-rand-062": FLOOR,
    "det-rand-065": FLOOR,
    "det-rand-076": FLOOR,
    "det-rand-081": FLOOR,
    "det-rand-101": IOU_FIRST,
    "det-rand-111": FLOOR,
    "det-rand-117": FLOOR,
    "det-rand-134": IOU_FIRST,
    "det-rand-140": FLOOR,
    "math-143": "an empty ground truth: error, not 0",
    "math-163": "both ratios are 0: error, not 0",
    "math-181": "a parameter we do not need is missing",
    "math-183": "the parameters are not JSON; ours are a mapping by type",
}
ERRORS = {"det-100", "det-351", "det-356", "math-143", "math-163"}


@pytest.fixture(scope="module")
def cases():
    if not CASES.exists():
        pytest.skip(f"no reference cases at {CASES}: they are not part of a clone")
    return {case["id"]: case for case in json.loads(CASES.read_text())}


def parameters(case):
    given = case["params"]["verifier_parm"]
    return given if isinstance(given, dict) else {}


def progress(case):
    return parameters(case).get("step", 0) / (parameters(case).get("total_steps") or 1)


def to_item(case):
    ratios = case["params"]
    names = ("det_verifier_normalized", "det_reward_ratio")
    params = {name: parameters(case).get(name) for name in names}
    if (threshold := ratios.get("DET_IOU_THRESHOLD")) not in (None, "dynamic", "average"):
        params["iou_threshold"] = float(threshold)
    reward = RewardConfig(
        case["verifier"],
        case["ground_truth"],
        accuracy_ratio=1.0 if ratios["accuracy_ratio"] is None else ratios["accuracy_ratio"],
        format_ratio=0.1 if ratios["format_ratio"] is None else ratios["format_ratio"],
        params=params,
    )
    grid = tuple(
        (height, width) for _, height, width in parameters(case).get("image_grid_thw") or ()
    )
    return Item(case["response"], reward, progress(case), grid)


def expected_reward(case):
    by_version = case["details"].get("reward_by_math_verify_version", {})
    return by_version.get("0.9.0", case["reward"])


def test_rewards_equal_the_originals_but_where_we_mean_to_differ(cases, router):
    verdicts = router.score([to_item(case) for case in cases.values()])
    agree = {
        name: verdict.status == "ok" and abs(verdict.score - expected_reward(case)) < 1e-6
        for (name, case), verdict in zip(cases.items(), verdicts, strict=True)
    }
    assert {name for name, same in agree.items() if not same} == set(DIFFERENT)
    statuses = {name: verdict.status for name, verdict in zip(cases, verdicts, strict=True)}
    assert {name for name, status in statuses.items() if status != "ok"} == ERRORS
    assert all(v.reason for v in verdicts if v.status == "error")


def test_every_sub_score_of_the_original(cases):
    """Boxes as the original parsed and floored them → its label_first and mAP numbers."""
    chosen = [
        case
        for case in cases.values()
        if case["details"].get("parsed_pred") and case["details"].get("parsed_gt")
    ]
    assert len(chosen) > 80
    rows, boxes = len(chosen), 24
    coords, labels = np.zeros((2, rows, boxes, 4)), np.full((2, rows, boxes), -1)
    threshold, share = np.zeros(rows), np.zeros(rows)
    for row, case in enumerate(chosen):
        words = {}
        for side, name in enumerate(("parsed_pred", "parsed_gt")):
            for k, (box, label) in enumerate(case["details"][name]):
                coords[side, row, k] = floored(box, case) if side == 0 else box
                labels[side, row, k] = words.setdefault(label, len(words))
        threshold[row] = original_threshold(case)
        ratios = parameters(case).get("det_reward_ratio") or {}
        share[row] = ratios.get("iou_completeness", 0.0)
    sides = [Boxes(coords[k], labels[k], labels[k] >= 0) for k in range(2)]
    with jax.enable_x64(True):
        only_label_first = np.eye(len(WEIGHTS))[np.zeros(rows, int)]
        parts = jax.jit(detection_parts)(*sides, threshold, only_label_first, share)
    theirs = {
        "map": "pure_map_score_reward",
        "map50": "pure_map50_score_reward",
        "map75": "pure_map75_score_reward",
        "precision_50": "report_iou_50_label_match_precision_reward",
        "recall_50": "report_iou_50_label_match_recall_reward",
        "accuracy": "weighted_iou_score_max_label_reward",
    }
    theirs |= {f"iou_{k}": f"report_iou_{k}_label_match_pure_reward" for k in (50, 75, 95, 99)}
    for ours, name in theirs.items():
        for row, case in enumerate(chosen):
            reference = case["details"]["rewards"].get(name)
            averaged = ours == "accuracy" and not np.isfinite(threshold[row])
            if reference is not None and not averaged:
                assert float(parts[ours][row]) == pytest.approx(reference, abs=1e-6), (
                    case["id"],
                    ours,
                )


def floored(box, case):
    sizes = parameters(case).get("image_grid_thw")
    if not parameters(case).get("det_verifier_normalized") or not sizes:
        return box
    _, height, width = sizes[0]
    return [int(v / side * 1000) for v, side in zip(box, (width, height) * 2, strict=True)]


def original_threshold(case):
    """NaN where it is the original's mean over thresholds."""
    given = case["params"]["DET_IOU_THRESHOLD"]
    if given == "dynamic":
        with jax.enable_x64(True):
            return float(stepped_threshold(progress(case)))
    return np.nan if given in ("average", "0.42", "1.0") else float(given)
