"""What the documents promise to list."""

from tests.documented import undocumented
from vtriune_jax.report import CURVES
from vtriune_jax.verifiers import counting, detection, grounding


def test_the_list_of_metrics_is_not_open():
    assert undocumented(["reward", "reward/a b", "pad/tokens", "sync/logp_gap/h:1"]) == []
    unknown = ["grad_norm/ocr", "reward_new/ocr", "length", "sync/new", "x"]
    assert undocumented(unknown) == sorted(unknown)


def test_all_parts_of_verifiers_are_documented():
    boxes = "<answer>\n[{'bbox_2d': [1, 2, 30, 40], 'label': 'dog'}]\n</answer>"
    one = "<answer>[1, 2, 30, 40]</answer>"
    parts = detection.verify(boxes, boxes, {}, 1.0).keys()
    parts |= grounding.verify(one, one, {}, 1.0).keys()
    parts |= counting.verify("\\boxed{2}", "2", {}, 1.0).keys()
    assert len(parts) > 20
    assert undocumented(f"reward_{part}/a" for part in parts) == []


def test_all_curves_of_the_report_are_documented():
    single = {"reward", "loss", "entropy", "kl", "clip_fraction", "grad_norm"}
    names = [name if name in single else f"{name}/a" for name in CURVES if name != "time"]
    assert undocumented(names) == []
