import dataclasses
import re
import sys
from pathlib import Path

import psutil
import pytest

from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers import known_verifiers, load
from vtriune_jax.verifiers.router import Item, Router


def with_verifier(item, name):
    return dataclasses.replace(item, reward=dataclasses.replace(item.reward, verifier=name))


def test_known_verifiers_are_the_files_of_the_folder():
    names = (
        "combination counting detection edit_distance exact grounding json_format mathverify "
        "multiple_choice numeric vqa"
    )
    known = dict(known_verifiers())
    assert sorted(known) == names.split()
    assert all(module == f"vtriune_jax.verifiers.{name}" for name, module in known.items())
    assert load("vqa").plain("The Two") == "2"
    table = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == names.split()


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package with verifiers of its own, which workers find, too."""
    (tmp_path / "theirs.py").write_text(
        "def verify(completion, ground_truth, params, progress):\n"
        "    return {'accuracy': progress, 'format': params['grid'][0][1]}\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    (tmp_path / "nan.py").write_text(
        "def verify(*_):\n    return {'accuracy': float('nan'), 'format': 0}\n"
    )
    (tmp_path / "five.py").write_text(
        "def verify(completion, ground_truth, params, progress):\n"
        "    return {'accuracy': 1, 'format': 1} | params['found']\n"
    )
    (tmp_path / "longest.py").write_text(
        "def verify(*task):\n"
        "    return verify_batch([task])[0]\n"
        "def verify_batch(tasks):\n"
        "    most = max(len(completion) for completion, *_ in tasks)\n"
        "    return [{'accuracy': len(text) / most, 'format': 1} for text, *_ in tasks]\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    names = ("theirs", "broken", "nan", "five", "longest")
    lines = [f"{name} = {name}" for name in names] + ["exact = theirs"]
    (info / "entry_points.txt").write_text("\n".join(["[vtriune_jax.verifiers]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    known_verifiers.cache_clear()
    router = Router(workers=1)
    yield router
    router.close()
    known_verifiers.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def test_a_package_adds_verifiers_by_entry_points(third_party, boxes_item):
    item = dataclasses.replace(boxes_item(), progress=0.25, grid=((7, 1),))
    names = ("theirs", "broken", "nan", "exact")
    verdicts = third_party.score([with_verifier(item, name) for name in names])
    theirs, broken, nan, exact = verdicts
    assert theirs.parts == {"accuracy": 0.25, "format": 1.0}
    assert broken.status == nan.status == "error"
    assert "nothing_like_it" in broken.reason
    assert "accuracy is not a finite number" in nan.reason
    assert exact.parts["accuracy"] == 1  # ours, not theirs


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"accuracy": 5.0}, "ValueError: the verifier's accuracy is 5, expected 0…1"),
        ({"accuracy": -0.1}, "ValueError: the verifier's accuracy is -0.1, expected 0…1"),
        ({"format": 2}, "ValueError: the verifier's format is 2, expected 0…1"),
        ({"format": float("inf")}, "ValueError: the verifier's format is not a finite number"),
        ({"accuracy": 1.0 + 1e-9, "boxes": 7}, ""),
    ],
)
def test_rewards_out_of_range_are_errors(third_party, found, reason):
    [alone] = third_party.score([Item("", RewardConfig("five", "1", params={"found": found}))])
    listed = {"verifiers": [{"name": "five", "params": {"found": found}, "weight": 0.1}]}
    [among] = third_party.score([Item("", RewardConfig("combination", "1", params=listed))])
    assert alone.reason == among.reason == reason
    assert alone.status == among.status == ("error" if reason else "ok")


def test_a_verifier_may_judge_batches(third_party):
    reward = RewardConfig("longest", "")
    verdicts = third_party.score([Item("ab", reward), Item("abcd", reward)])
    assert [v.score for v in verdicts] == [0.5, 1.0]


def test_the_servers_defaults_are_overridden_by_rows_and_items(boxes_item):
    shifted = "[{'bbox_2d': [115, 100, 315, 300], 'label': 'dog'}]"
    router = Router(workers=1, defaults={"iou_threshold": 0.9})
    try:
        scores = [
            verdict.parts["accuracy"]
            for verdict in router.score(
                [
                    boxes_item(shifted),
                    boxes_item(shifted, iou_threshold=0.5),
                    boxes_item(shifted, threshold=0.5),
                    boxes_item(shifted, threshold=0.9, iou_threshold=0.5),
                    boxes_item(shifted, iou_threshold=None),
                ]
            )
        ]
    finally:
        router.close()
    assert [score > 0 for score in scores] == [False, True, True, False, False]


def test_a_mixed_batch_is_answered_in_order(router, boxes_item, math_item):
    items = [
        boxes_item(),
        math_item("42"),
        boxes_item("nothing"),
        math_item("41"),
        boxes_item(),
    ] * 5
    verdicts = router.score(items)
    assert [v.status for v in verdicts] == ["ok"] * 25
    assert [v.score for v in verdicts] == pytest.approx([1, 1, 0, 0, 1] * 5)
    assert set(verdicts[1].parts) == {"accuracy", "format"}
    assert router.score([]) == []


def test_the_score_is_the_rows_combination(router, math_item):
    item = math_item("42")
    reward = dataclasses.replace(item.reward, accuracy_ratio=1.0, format_ratio=3.0)
    quarter = dataclasses.replace(item, completion="<think>\n" + item.completion, reward=reward)
    assert router.score([quarter])[0].score == pytest.approx((1 + 3 * 0.25) / 4)


def test_what_cannot_be_judged_is_an_error_with_a_reason(router, boxes_item, math_item):
    no_ratio = dataclasses.replace(math_item("1").reward, accuracy_ratio=0.0, format_ratio=0.0)
    items = {
        "unknown verifier 'nonsense'; known are combination, counting, detection": with_verifier(
            boxes_item(), "nonsense"
        ),
        "unknown verifier 'worker'": with_verifier(boxes_item(), "worker"),
        "cannot read the ground truth": math_item("1", truth="yes"),
        "holds no box": boxes_item(truth="yes"),
        "accuracy_ratio=0.0, format_ratio=0.0": Item("", no_ratio),
    }
    for reason, verdict in zip(items, router.score(list(items.values())), strict=True):
        assert (verdict.status, verdict.score) == ("error", 0)
        assert reason in verdict.reason
        assert "\n" not in verdict.reason


def worker_pids():
    children = psutil.Process().children()
    return {child.pid for child in children if "vtriune_jax.verifiers.worker" in child.cmdline()}


def test_workers_import_no_jax(router, math_item, boxes_item):
    router.score([math_item("42"), boxes_item()] * 8)
    libraries = {line.path for pid in worker_pids() for line in psutil.Process(pid).memory_maps()}
    assert libraries
    assert not [path for path in libraries if "jaxlib" in path or "torch" in path]
