import subprocess
import sys

import numpy as np
import pytest

from vtriune_jax.verifiers import detection
from vtriune_jax.verifiers.router import task

SHIFTED = "[{'bbox_2d': [115, 100, 315, 300], 'label': 'dog'}]"  # IoU 0.8605
THREE = (
    "[{'bbox_2d': [0, 0, 10, 10], 'label': 'a'}, {'bbox_2d': [20, 20, 40, 40], 'label': 'b'}, "
    "{'bbox_2d': [50, 50, 60, 70], 'label': 'a'}]"
)


def verify_batch(items):
    return detection.verify_batch([task(item, {}) for item in items])


def one(item):
    return verify_batch([item])[0]


def test_a_perfect_answer(boxes_item):
    parts = one(boxes_item())
    zero_or_one = {name: round(value, 9) for name, value in parts.items()}
    assert zero_or_one == dict.fromkeys(parts, 1.0)
    assert {
        "accuracy",
        "format",
        "iou",
        "iou_50",
        "iou_99",
        "precision_50",
        "map",
        "map50",
        "boxes",
    } <= {*parts}


@pytest.mark.parametrize(
    ("progress", "accuracy"), [(0.0, 185 / 215), (0.1, 185 / 215), (0.11, 0.0), (0.9, 0.0)]
)
def test_the_threshold_follows_the_progress(boxes_item, progress, accuracy):
    weights = {"iou_max_label_first": 1.0}
    parts = one(boxes_item(SHIFTED, progress=progress, det_reward_ratio=weights))
    assert parts["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert parts["iou"] == parts["iou_50"] == parts["iou_75"] == pytest.approx(185 / 215)
    assert parts["iou_95"] == 0


def test_a_row_and_an_item_override_the_threshold(boxes_item):
    weights = {"iou_max_label_first": 1.0}
    row = boxes_item(SHIFTED, progress=0.9, iou_threshold=0.5, det_reward_ratio=weights)
    assert one(row)["accuracy"] == pytest.approx(185 / 215)
    item = boxes_item(SHIFTED, threshold=0.95, iou_threshold=0.5, det_reward_ratio=weights)
    assert one(item)["accuracy"] == 0
    dynamic = boxes_item(SHIFTED, iou_threshold="dynamic", det_reward_ratio=weights)
    assert one(dynamic)["accuracy"] == pytest.approx(185 / 215)


def test_the_threshold_is_reached_exactly(boxes_item):
    """0.85 = 17/20: float32 on the way would miss it."""
    truth, answer = (f"[{{'bbox_2d': [0, 0, {width}, 10], 'label': 'x'}}]" for width in (200, 170))
    assert one(boxes_item(answer, truth))["accuracy"] == pytest.approx(0.7 * 0.85 + 0.3)


def test_pixels_are_rescaled_to_the_grid_of_the_truth(boxes_item):
    answer = "[{'bbox_2d': [103.6, 67.2, 310.8, 201.6], 'label': 'dog'}]"
    params = {"det_verifier_normalized": True, "threshold": 0.99}
    assert one(boxes_item(answer, grid=((672, 1036), (28, 28)), **params))[
        "accuracy"
    ] == pytest.approx(1)
    error = one(boxes_item(answer, **params))
    assert isinstance(error, ValueError)
    assert "size of the processed image" in str(error)


def test_published_weights_unless_given(boxes_item):
    missed = (
        "[{'bbox_2d': [0, 0, 10, 10], 'label': 'a'}, {'bbox_2d': [20, 20, 40, 40], 'label': 'b'}]"
    )
    expected = 0.6 * (0.7 * 2 / 3 + 0.3 * (1 - (1 / 3) / 2))
    names = ("iou_max_label_first", "iou_completeness", "map")
    for ratios in ({}, {"det_reward_ratio": None}, {"det_reward_ratio": dict.fromkeys(names)}):
        assert one(boxes_item(missed, THREE, **ratios))["accuracy"] == pytest.approx(expected)
    by_iou = one(boxes_item(missed, THREE, det_reward_ratio={"iou_max_iou_first": 1.0}))
    assert by_iou["accuracy"] == pytest.approx(0.6 * 2 / 3)
    by_map = one(boxes_item(missed, THREE, det_reward_ratio={"map": 1.0, "map75": 0.5}))
    assert by_map["accuracy"] == pytest.approx(0.6 * (by_map["map"] + 0.5 * by_map["map75"]) / 1.5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"truth": "[]"}, "holds no box"),
        ({"truth": "no boxes at all"}, "holds no box"),
        ({"det_reward_ratio": {"map": 0.0}}, "sum > 0"),
        ({"det_reward_ratio": {"map": 1.0, "map50": -1.0}}, "weights ≥ 0"),
        ({"det_reward_ratio": {"map": 1.0, "iou_completeness": 1.5}}, "iou_completeness=1.5"),
        ({"iou_threshold": "high"}, "iou_threshold='high'"),
        ({"det_reward_ratio": "all"}, "items"),
    ],
)
def test_a_row_at_fault_is_an_error_of_its_own(boxes_item, fields, reason):
    fine, wrong, also_fine = verify_batch([boxes_item(), boxes_item(**fields), boxes_item()])
    assert isinstance(wrong, Exception)
    assert reason in str(wrong)
    assert fine == also_fine
    assert fine["accuracy"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>\n{}\n</answer>", 0.0),
        ("x\n<answer>\n{}\n</answer>", 1.0),
        ("x\n<answer>{}</answer>", 0.0),
        ("x\n<answer>\n{}\n</answer>\n</answer>", 0.0),
        ("I put it in <answer> tags.\n<answer>\n{}\n</answer>", 1.0),
    ],
)
def test_format_wants_the_tags_on_lines_of_their_own(boxes_item, completion, expected):
    box = "[{'bbox_2d': [100, 100, 300, 300], 'label': 'dog'}]"
    parts = one(boxes_item(completion=completion.replace("{}", box)))
    assert parts["format"] == expected
    assert parts["accuracy"] == pytest.approx(1)
    assert one(boxes_item(completion=completion.replace("{}", "[]")))["format"] == 0


def listed(corners):
    """Boxes of 50 × 50 as text."""
    return str([{"bbox_2d": [x, y, x + 50, y + 50], "label": "dog"} for x, y in corners])


def test_items_do_not_change_each_other(boxes_item):
    """Of any company, in any order, whatever bucket they fall into."""
    rng = np.random.default_rng(0)
    items = []
    for n in rng.integers(1, 40, 100):
        corners = rng.integers(0, 900, (n, 2)).tolist()
        items.append(boxes_item(listed(corners), truth=listed(corners[: n // 2 + 1])))
    together = verify_batch(items)
    order = rng.permutation(len(items))
    assert [together[k] for k in order] == verify_batch([items[k] for k in order])
    assert together == [one(item) for item in items]
    assert together[:3] == verify_batch(items[:3])


def test_many_boxes_and_wild_coordinates(boxes_item):
    answers = [
        listed((k, 0) for k in range(2_000)),  # only the first 256 are matched, all are counted
        listed((k, 0) for k in range(10_000)),  # longer than any list may be
        "[{'bbox_2d': [-1e9, -1e9, 1e9, 1e9], 'label': 'dog'}]",
        "[{'bbox_2d': [NaN, 0, 1, 1], 'label': 'dog'}, {'bbox_2d': [0, 0, Infinity, 1]}]",
        "[{'bbox_2d': [100, 100, 100, 300], 'label': 'dog'}]",
    ]
    parts = verify_batch([boxes_item(answer) for answer in answers])
    assert [part["boxes"] for part in parts] == [2_000, 0, 1, 0, 1]
    assert all(np.isfinite(value) for part in parts for value in part.values())
    assert all(part["accuracy"] < 1e-6 for part in parts)


def test_one_is_judged_as_in_a_batch(boxes_item):
    item = boxes_item(SHIFTED)
    assert detection.verify(*task(item, {})) == one(item)
    with pytest.raises(ValueError, match="holds no box"):
        detection.verify(*task(boxes_item(truth="[]"), {}))
    assert verify_batch([]) == []


def test_the_average_threshold(boxes_item):
    """IoU 0.8605 is reached by 8 of the 11, up to 0.85."""
    weights = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}
    item = boxes_item(SHIFTED, iou_threshold="average", det_reward_ratio=weights)
    expected = (8 * (0.7 * 185 / 215 + 0.3)) / 11
    assert one(item)["accuracy"] == pytest.approx(expected)
    fixed = boxes_item(SHIFTED, iou_threshold=0.5, det_reward_ratio=weights)
    alone, mixed = one(fixed), verify_batch([item, fixed])[1]
    assert mixed == alone


@pytest.mark.parametrize(("progress", "accuracy"), [(0.5, 185 / 215), (0.51, 0.0)])
def test_own_stages(boxes_item, progress, accuracy):
    stages = {"bounds": [0.5], "values": [0.86, 0.87]}
    weights = {"iou_max_label_first": 1.0}
    item = boxes_item(SHIFTED, progress=progress, iou_threshold=stages, det_reward_ratio=weights)
    assert one(item)["accuracy"] == pytest.approx(accuracy)


def test_a_threshold_as_text(boxes_item):
    item = boxes_item(SHIFTED, iou_threshold=" 9e-1", det_reward_ratio={"iou_max_label_first": 1})
    assert one(item)["accuracy"] == 0


def test_a_worker_needs_no_jax():
    code = (
        "import sys, vtriune_jax.verifiers.detection as d; "
        "d.verify('', \"[{'bbox_2d': [0, 0, 1, 1], 'label': 'x'}]\", {}, 0.0); "
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
