import dataclasses
import os
import signal
import sys
import threading
import time

import psutil
import pytest

import vtriune_jax.verifiers
from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.router import Item, Router

HOSTILE = {
    "a tower of exponents": r"\boxed{9^{9^{9^{9}}}}",
    "a factorial": r"\boxed{99999999!}",
    "a sum of a million terms": rf"\boxed{{{'1+' * 500_000}1}}",
    "deep nesting": rf"\boxed{{{'(' * 20_000}1{')' * 20_000}}}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 3_000 + "2" + "}" * 3_000 + "}",
    "a megabyte of braces": r"\boxed" + "{" * 2**20,
    "a megabyte of dollars": "$" * 2**20 + r"\boxed{1}",
    "NUL bytes": "\0" * 1000 + r"\boxed{\0}",
    "lone surrogates": "\ud800\udfff" + r"\boxed{" + "\udc00}",
    "every quote": r"\boxed{'\"`}",
}
START = 10.0  # seconds for workers to start on a busy machine
LIMIT = 2.0  # conftest's


def with_verifier(item, name):
    return dataclasses.replace(item, reward=dataclasses.replace(item.reward, verifier=name))


def test_known_verifiers_are_the_files_of_the_folder():
    assert dict(known_verifiers()) == {"detection": "verify_batch", "mathverify": "verify"}


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
        "unknown verifier 'nonsense'; known are detection, mathverify": with_verifier(
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


def test_hostile_completions_cost_their_neighbours_nothing(router, math_item, boxes_item):
    hostile = [Item(text, math_item("1").reward) for text in HOSTILE.values()]
    fine = [math_item("42"), boxes_item()]
    items = [item for each in hostile for item in (each, *fine)]
    start = time.monotonic()
    verdicts = router.score(items)
    assert time.monotonic() - start < len(hostile) * (LIMIT + 2) / 2 + START
    for name, verdict in zip(HOSTILE, verdicts[::3], strict=True):
        assert verdict.score == 0, name
        assert verdict.status in ("ok", "timeout", "error"), name
    assert verdicts[0].status == "timeout"
    assert "2 s" in verdicts[0].reason
    for k in (1, 2):
        assert {v.status for v in verdicts[k::3]} == {"ok"}
        assert [v.score for v in verdicts[k::3]] == pytest.approx([1.0] * len(hostile))
    # detection sees the same texts as answers
    verdicts = router.score([boxes_item(text) for text in HOSTILE.values()])
    assert {(v.status, v.score) for v in verdicts} == {("ok", 0.0)}


def test_a_worker_that_dies_is_replaced(math_item):
    others = worker_pids()
    router = Router(workers=1, limit=60)
    try:
        assert router.score([math_item("42")])[0].score == 1
        (pid,) = worker_pids() - others
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        slow = Item(HOSTILE["a tower of exponents"], math_item("1").reward)
        verdicts = router.score([slow, math_item("42")])
        killer.join()
        assert verdicts[0].status == "error"
        assert "the verifier process died (exit status -9)" in verdicts[0].reason
        assert verdicts[1].score == 1
    finally:
        router.close()
    assert worker_pids() == others


def worker_pids():
    children = psutil.Process().children()
    return {child.pid for child in children if "vtriune_jax.verifiers.worker" in child.cmdline()}


def test_workers_import_no_jax(router, math_item):
    router.score([math_item("42")])
    libraries = {line.path for pid in worker_pids() for line in psutil.Process(pid).memory_maps()}
    assert libraries
    assert not [path for path in libraries if "jaxlib" in path or "torch" in path]


def test_a_verifier_is_one_function_in_a_file(tmp_path, monkeypatch, boxes_item):
    """One on batches; those on single completions run in workers, which see only the package."""
    (tmp_path / "longest.py").write_text(
        "def verify_batch(items):\n"
        "    most = max(len(item.completion) for item in items)\n"
        "    return [{'accuracy': len(i.completion) / most, 'format': 1} for i in items]\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_like_it\ndef verify_batch(items): ...\n")
    (tmp_path / "nan.py").write_text(
        "def verify_batch(items):\n    return [{'accuracy': float('nan'), 'format': 0}]\n"
    )
    folders = [*vtriune_jax.verifiers.__path__, str(tmp_path)]
    monkeypatch.setattr(vtriune_jax.verifiers, "__path__", folders)
    known_verifiers.cache_clear()
    router = Router(workers=1)
    try:
        reward = RewardConfig("longest", "")
        verdicts = router.score([Item("ab", reward), Item("abcd", reward)])
        assert [v.score for v in verdicts] == [0.5, 1.0]
        broken, nan = router.score(
            [with_verifier(boxes_item(), name) for name in ("broken", "nan")]
        )
        assert broken.status == nan.status == "error"
        assert "nothing_like_it" in broken.reason
        assert "accuracy is not a finite number" in nan.reason
    finally:
        router.close()
        known_verifiers.cache_clear()
        for name in ("longest", "nan"):
            sys.modules.pop(f"vtriune_jax.verifiers.{name}", None)
