"""What is said of rows and verifiers before anything is judged."""

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verifiers.conftest import BOX
from tests.verifiers.hostile_test import QUESTIONS
from vtriune_jax.errors import UserError
from vtriune_jax.verifiers import checking as module
from vtriune_jax.verifiers import known_verifiers, load, mathverify
from vtriune_jax.verifiers.checking import GIVEN, check, checking

BOXES = f"<answer>{BOX}</answer>"


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_good_rows_have_no_fault(name):
    _, truth, params = QUESTIONS[name]
    check(name, truth, params)
    check(name, truth, params | {"det_verifier_normalized": True, "verifier_style": "rule"})


@pytest.mark.parametrize("name", sorted(set(QUESTIONS) - {"combination"}))
def test_every_verifier_of_ours_knows_its_parameters_and_checks_its_truth(name):
    documented = load(name).__doc__ or ""
    for parameter in load(name).PARAMETERS:
        assert f"`{parameter}`" in documented
    with pytest.raises(ValueError, match="unknown parameter 'colour'; "):
        check(name, QUESTIONS[name][1], {"colour": 1})
    if name != "json_format":  # to which no truth is an answer of any content
        with pytest.raises(ValueError, match="ground truth"):
            check(name, " ", {})


FAULTY = [
    ("mathverify", "yes", {}, r"cannot read the ground truth 'yes'; write it as \boxed{…}"),
    ("mathverify", "4", {"tolerance": 1}, "unknown parameter 'tolerance'; known are none"),
    ("detection", "<answer>none</answer>", {}, "the ground truth holds no box: '<answer>none"),
    ("detection", BOXES, {"iou_treshold": 0.5}, "parameter 'iou_treshold'; did you mean 'iou_thr"),
    ("detection", BOXES, {"iou_threshold": 5}, "iou_threshold=5; expected"),
    ("detection", BOXES, {"det_reward_ratio": {"map": -1.0}}, "expected weights ≥ 0"),
    ("grounding", f"[{BOX[1:-1]}, {{'bbox_2d': [0, 0, 1, 1]}}]", {}, "is not one box"),
    ("grounding", BOX, {"iou_threshold": "high"}, "iou_threshold='high'"),
    ("counting", "many", {}, "the ground truth 'many' is not a number"),
    ("counting", "4", {"tolerence": 1}, "unknown parameter 'tolerence'; did you mean 'tolerance'?"),
    ("counting", "4", {"tolerance": "1"}, "tolerance='1', expected a number ≥ 0"),
    ("numeric", "4", {"tolerance": -1}, "tolerance=-1, expected a number ≥ 0"),
    ("multiple_choice", "the cat", {}, "names no option"),
    ("exact", "a", {"accepted": [1]}, "expected texts"),
    ("edit_distance", "a", {"threshold": 2}, "threshold=2, expected a number of 0…1"),
    ("vqa", "a", {"answer": []}, "did you mean 'answers'?"),
    ("json_format", "{", {}, "ground truth or schema at fault"),
    ("json_format", "", {"schema": {"type": "objekt"}}, "ground truth or schema at fault"),
    ("combination", "a", {}, "verifiers=None; expected a list of objects"),
    ("combination", "a", {"verifiers": []}, "sum to 0"),
    ("combination", "a", {"verifiers": [{"name": "counting"}]}, "'a' is not a number"),
    (
        "combination",
        "4",
        {"verifiers": [{"name": "counting", "params": {"tolerence": 1}}]},
        "unknown parameter 'tolerence'; did you mean 'tolerance'?",
    ),
    (
        "combination",
        "4",
        {"verifiers": [{"name": "counting"}, {"name": "exact"}], "acepted": ["5"]},
        "unknown parameter 'acepted'; did you mean 'accepted'?",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "truth", "params", "reason"), FAULTY)
def test_faulty_rows(name, truth, params, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        check(name, truth, params)
    assert not isinstance(caught.value, UserError)


def test_verifiers_of_a_combination_may_share_parameters():
    listed = [{"name": "counting", "params": {"tolerance": 1}}, {"name": "exact"}]
    check("combination", "4", {"verifiers": listed, "accepted": ["four"], "tolerance": 2})


def test_what_v_triune_gives_its_verifiers_is_known_to_ours():
    for name in known_verifiers():
        check(name, QUESTIONS[name][1], QUESTIONS[name][2] | dict.fromkeys(GIVEN - {"grid"}))


WORDS = st.sampled_from(
    [*"xe,=()^+-/%°[]{}½π", *("yes", "pi", "oo", "infinity", "sin", "sqrt", "and", "percent")]
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(WORDS | st.text(max_size=8), max_size=6).map(" ".join))
def test_no_truth_that_math_verify_reads_is_refused(truth):
    try:
        mathverify.check(truth, {})
    except ValueError:
        assert not mathverify._gold(truth)


def test_a_check_of_a_long_text_is_quick():
    check("edit_distance", "ab" * 8_000, {})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Adds an installed verifier `own`, of that source."""

    def add(source):
        (tmp_path / "own_verifier.py").write_text(source)

    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vtriune_jax.verifiers]\nown = own_verifier")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    known_verifiers.cache_clear()
    yield add
    known_verifiers.cache_clear()
    module._loaded.cache_clear()
    assert "own_verifier" not in sys.modules  # nothing of a user's is imported in this process


VERIFY = "def verify(completion, ground_truth, params, progress):\n    return {}\n"


def test_own_verifiers_take_any_parameters_unless_they_declare_them(own):
    rows = [("own", "", {"anything": 1}), ("exact", "a", {}), ("own", "x", {"some": 1})]
    own(VERIFY)
    with checking() as check_rows:
        assert check_rows(rows) == ["", "", ""]
        assert check_rows([]) == []
    own(
        f"PARAMETERS = ('some',)\n{VERIFY}\n"
        "def check(ground_truth, params):\n    if not ground_truth:\n        1 / 0\n"
    )
    with checking() as check_rows:
        assert (
            check_rows(rows * 300)
            == [
                "verifier own: unknown parameter 'anything'; known are some",
                "",
                "",
            ]
            * 300
        )
        assert check_rows([("own", "", {})]) == [
            "verifier own: ZeroDivisionError: division by zero"
        ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def verify(:\n", "cannot be imported (SyntaxError: "),
        (f"import nothing_like_it\n{VERIFY}", "cannot be imported (ModuleNotFoundError: No module"),
        ("def verify(completion, truth):\n    ...\n", "verify cannot be called with (completion, "),
        ("verify = 7\n", "verify cannot be called with (completion, ground_truth, params, progre"),
        ("", "verify cannot be called with (completion, ground_truth, params, progress): module"),
        (f"{VERIFY}\nraise SystemExit(3)\n", "the verifier process died (exit status 3)"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_verifier_that_cannot_be_used(own, tmp_path, source, reason, listed):
    own(source)
    row = ("combination", "1", {"verifiers": [{"name": "own"}]}) if listed else ("own", "1", {})
    with checking() as check_rows, pytest.raises(UserError) as caught:
        check_rows([("exact", "1", {}), row])
    text = str(caught.value)
    assert reason in text
    if "process died" not in text:
        assert text.startswith(f"{tmp_path / 'own_verifier.py'}: ")
        assert text.endswith("; correct it or reward_model.verifier")
    elif not listed:
        assert text.startswith("verifier own (own_verifier) cannot be imported, or its check")
